//! What a filesystem refuses is done another way, with the same bytes, and the report says what and why.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tensorhaul::{
    DeviceId, Dtype, EngineChoice, ErrorKind, Fallback, Handover, LoadOptions, Loaded, Model, Preference,
    Request,
};

use crate::common::{
    Cache, Folder, assert_consistent, assert_passes_alone, assert_same, awkward, encode, evict,
    is_own_process, reference, skip, stored,
};

#[test]
fn a_filesystem_in_memory_is_read_through_the_page_cache_and_never_directly() {
    let Some(folder) = Folder::in_memory() else { return };
    let paths = folder.checkpoint(&awkward());
    let expected = reference(&paths);
    for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring] {
        let loaded = Model::open(folder.path()).unwrap().load(&private().engine(engine)).unwrap();
        assert_same(loaded.tensors.iter(), &expected, &format!("{engine:?}"));
        let report = loaded.report;
        assert_eq!((report.bytes_direct, report.bytes_cold), (0, 0), "{engine:?}");
        let is_about_the_file = |fallback: &Fallback| fallback.what.contains("page cache");
        assert!(!report.fallbacks.iter().any(is_about_the_file), "{engine:?}: {:?}", report.fallbacks);
    }
}

#[test]
fn holes_of_a_filesystem_in_memory_are_cold_and_the_report_says_why_they_are_not_read_directly() {
    let Some(folder) = Folder::in_memory() else { return };
    // A file that is all hole but for its header: no page of its data is in memory.
    let header = encode(&[stored("w", Dtype::U8, &[1 << 20])], 0);
    let path = folder.write("hole.safetensors", &header[..4096]);
    File::options().write(true).open(&path).unwrap().set_len(header.len() as u64).unwrap();
    let loaded = Model::open(&path).unwrap().load(&private()).unwrap();
    assert!(loaded.tensors.get("w").unwrap().bytes().unwrap().iter().all(|byte| *byte == 0));
    let expected = Fallback {
        what: "1 file is read through the page cache instead of past it".to_owned(),
        why: "tmpfs keeps its files in memory".to_owned(),
    };
    assert_eq!((loaded.report.bytes_direct, loaded.report.fallbacks), (0, vec![expected]));
}

#[test]
fn an_overlay_loads_right_hot_and_cold() {
    let test = "fallbacks::an_overlay_loads_right_hot_and_cold";
    if is_own_process() {
        return on_overlay(Path::new(&std::env::var_os(OVERLAY).unwrap()));
    }
    let folder = Folder::on_disk();
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
    }
    // One file below, as in an image of a container, and one above, as written in the container.
    let [below, above] = ["lower/1.safetensors", "upper/2.safetensors"];
    folder.write(
        below,
        &encode(&[stored("below", Dtype::U8, &[2_000_000]), stored("odd", Dtype::F32, &[999])], 1),
    );
    folder.write(above, &encode(&[stored("above", Dtype::U8, &[2_000_000])], 0));
    let options = "lowerdir=lower,upperdir=upper,workdir=work";
    let mount = format!(
        "mount -t overlay overlay -o {options} merged || mount -t overlay overlay -o {options},userxattr merged"
    );
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c", script, "sh"]).current_dir(folder.path());
        command
    };
    match unshare(&format!("{{ {mount}; }} 2>&1")).output() {
        Ok(tried) if tried.status.success() => {}
        Ok(tried) => return skip(&format!("an overlay: {}", String::from_utf8_lossy(&tried.stdout).trim())),
        Err(error) => return skip(&format!("unshare: {error}")),
    }
    let mut command = unshare(&format!("{{ {mount}; }} && exec \"$@\""));
    command.arg(std::env::current_exe().unwrap()).env(OVERLAY, folder.path().join("merged"));
    assert_passes_alone(command, test);
}

fn on_overlay(merged: &Path) {
    let paths = [merged.join("1.safetensors"), merged.join("2.safetensors")];
    assert_eq!(tensorhaul_io::probe::filesystem(File::open(&paths[0]).unwrap()), Some("overlayfs"));
    let expected = reference(&paths);
    for cache in [Cache::Hot, Cache::Cold] {
        for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring, EngineChoice::Mmap] {
            for in_place in [Preference::Preferred, Preference::Off] {
                let options = private().engine(engine).in_place(in_place);
                let loaded = load_on_overlay(merged, &paths, &options, cache);
                let context = format!("{cache:?}, {options:?}: {:?}", loaded.report);
                assert_same(loaded.tensors.iter(), &expected, &context);
                assert_consistent(&loaded.report, 256 << 20, &context);
                // A hot file is never read past the page cache, whatever lies under it.
                assert!(cache == Cache::Cold || loaded.report.bytes_direct == 0, "{context}");
                let is_explained =
                    loaded.report.fallbacks.iter().any(|fallback| fallback.why.contains("page cache"));
                let is_direct = loaded.report.bytes_direct > 0;
                assert!(
                    cache == Cache::Hot || engine == EngineChoice::Mmap || is_direct || is_explained,
                    "{context}"
                );
            }
        }
    }
}

#[test]
fn reads_in_place_can_be_required_of_the_host() {
    let folder = Folder::on_disk();
    let expected = reference(&folder.checkpoint(&awkward()));
    let loaded = Model::open(folder.path()).unwrap().load(&private().in_place(Preference::Required)).unwrap();
    assert_same(loaded.tensors.iter(), &expected, "in place");
    assert!(loaded.report.bytes_in_place > 0);
}

#[test]
fn a_plan_counts_on_direct_storage_that_a_load_would_try() {
    let folder = Folder::on_disk();
    folder.checkpoint(&awkward());
    let model = Model::open(folder.path()).unwrap();
    let plan = |direct_storage| {
        let mut request = Request::all();
        request.device = DeviceId::Cuda(0);
        let options = private().in_place(Preference::Required).direct_storage(direct_storage);
        model.plan(&options.request(request))
    };
    for direct_storage in [Preference::Preferred, Preference::Required] {
        assert!(plan(direct_storage).unwrap().promised().in_place_bytes > 0, "{direct_storage:?}");
    }
    let error = plan(Preference::Off).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    assert!(error.one_line().contains("cannot write into its memory"), "{}", error.one_line());
}

pub(crate) fn private() -> LoadOptions {
    LoadOptions::default().handover(Handover::Private)
}

/// Opens and loads on an overlay, which does not tell what the page cache holds.
fn load_on_overlay(merged: &Path, files: &[PathBuf], options: &LoadOptions, cache: Cache) -> Loaded {
    let model = Model::open(merged).unwrap();
    for file in files {
        std::fs::read(file).unwrap();
        if cache == Cache::Cold {
            evict(file);
        }
    }
    model.load(options).unwrap()
}

/// Where the test's own process finds the overlay it was started on.
const OVERLAY: &str = "TENSORHAUL_TEST_OVERLAY";
