//! What is decided once a process: libraries that are missing, old, or told by the environment.

use std::path::{Path, PathBuf};
use std::process::Command;

use tensorhaul::{DirectMode, ErrorKind, Model, Preference};
use tensorhaul_direct::{CUFILE_LIBRARY_VARIABLE, HIPFILE_LIBRARY_VARIABLE};

use crate::sim::library_path;
use crate::{
    AMD_VARIABLE, assert_same_bytes, checkpoint, folder, machine, options, options_of_long_ones, reasons,
};

/// Runs an ignored test of this binary in a process of its own, and returns what it printed behind `probe: `.
fn run(test: &str, variables: &[(&str, &Path)]) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--ignored"]);
    let output = command.envs(variables.iter().copied()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<_> = text.lines().filter_map(|line| Some(line.split_once("probe: ")?.1)).collect();
    assert!(!lines.is_empty(), "{text}");
    lines.join("\n")
}

#[test]
#[ignore = "run by the tests below, with another environment"]
fn load_in_a_process_of_its_own() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("");
    let mode = DirectMode::Batch { entries: 8 };
    match model.load(&options(Preference::Required).direct_mode(mode)) {
        Err(error) => println!("probe: {}", error.one_line()),
        Ok(loaded) => {
            assert_same_bytes(&model, &loaded);
            println!("probe: {}", loaded.report.engine);
            reasons(&loaded).iter().for_each(|reason| println!("probe: {reason}"));
        }
    }
    sim.assert_clean("a load");
}

#[test]
fn a_library_that_is_missing_is_named_with_what_was_tried() {
    let nowhere = Path::new("/nowhere/libcufile.so.0");
    let line = run("processes::load_in_a_process_of_its_own", &[(CUFILE_LIBRARY_VARIABLE, nowhere)]);
    assert!(line.contains("cuFile: no driver library found (tried /nowhere/libcufile.so.0)"), "{line}");
    let other = Path::new("libc.so.6");
    let line = run("processes::load_in_a_process_of_its_own", &[(CUFILE_LIBRARY_VARIABLE, other)]);
    assert!(line.contains("cuFile: libc.so.6 lacks cuFileDriverOpen"), "{line}");
}

#[test]
fn a_library_without_what_is_optional_reads_on_threads_and_is_not_trusted_blindly() {
    let folder = folder();
    let test = "processes::load_in_a_process_of_its_own";
    let with = |missing: &[&str]| {
        let library = library_without(folder.path(), missing);
        let variables = [tensorhaul_cuda::LIBRARY_VARIABLE, CUFILE_LIBRARY_VARIABLE, "SIMGPU_LIBRARY"];
        run(test, &variables.map(|variable| (variable, &*library)))
    };
    let line = with(&["cuFileBatchIOSubmit"]);
    assert!(
        line.ends_with(
            "cufile\ndirect storage reads on threads instead of in batches: the library has no batches"
        ),
        "{line}"
    );
    // Told, though it cannot be asked.
    assert!(with(&["cuFileGetParameterBool"]).ends_with("cufile"));
    // Neither told nor asked: its properties say that it is allowed to fall back.
    let line = with(&["cuFileGetParameterBool", "cuFileSetParameterBool"]);
    assert!(line.contains("its configuration allows that, and it cannot be told otherwise"), "{line}");
    let line = with(&["cuFileGetParameterBool", "cuFileSetParameterBool", "cuFileDriverGetProperties"]);
    assert!(line.contains("it can neither be told nor asked"), "{line}");
}

#[test]
fn hipfile_reads_where_the_environment_forbids_its_fallback() {
    let test = "hipfile::whole_pages_are_read_by_storage_and_the_rest_by_the_host";
    let library = library_path();
    let variables =
        [("HIPFILE_ALLOW_COMPAT_MODE", Path::new("false")), (HIPFILE_LIBRARY_VARIABLE, &*library)];
    assert_eq!(run(test, &variables), "read");
}

#[test]
fn whole_loads_go_by_hipfile_as_they_go_by_cufile() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["load::", "several::", "quantized::"]);
    let output = command.env(AMD_VARIABLE, "1").env("HIPFILE_ALLOW_COMPAT_MODE", "false").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(!text.contains(" 0 passed"), "{text}");
}

#[test]
#[ignore = "run by the tests below, in a process of its own: what it leaves is left for good"]
fn reads_that_never_end() {
    let folder = folder();
    for (fault, why) in [
        ("fail=cuFileBatchIOGetStatus:1:5041;fail=cuFileBatchIOGetStatus:2:5041", "GetStatus returned 5041"),
        ("fail=cuFileBatchIOSubmit:1:5035", "Submit returned 5035"),
        ("direct_told=32:1000000", "a read in a batch timed out"),
        ("fail=cuFileBatchRead:1:719", "cuda:0: "),
    ] {
        if std::env::var("FAULT").is_ok_and(|number| !fault.contains(&number)) {
            continue;
        }
        let model = Model::open(checkpoint(folder.path())).unwrap();
        let sim = machine(fault);
        let batches =
            options_of_long_ones(Preference::Required).direct_mode(DirectMode::Batch { entries: 2 });
        let error = model.load(&batches).unwrap_err();
        let line = error.one_line();
        assert!(line.contains(why), "{fault}: {line}");
        assert_eq!(error.kind() == ErrorKind::Device, fault.contains("719"), "{fault}: {line}");
        println!("probe: {line}");
        let last = folder.path().join("part-0.safetensors");
        drop((error, model));
        tensorhaul::release_devices();
        let happened = sim.report();
        assert!(happened.violations.is_empty(), "{fault}: {:?}", happened.violations);
        for call in ["BatchIODestroy", "BufDeregister", "HandleDeregister", "DriverClose"] {
            assert_eq!(happened.calls(&format!("cuFile{call}")), 0, "{fault}: {call}");
        }
        let live = |what: &str| happened.live[&format!("live.{what}")];
        assert!(live("allocations") > 0 && live("storage_buffers") > 0 && live("contexts") == 1, "{fault}");
        assert!(live("storage_batches") == 1 && live("storage_files") > 0, "{fault}");
        assert!(is_open(&last), "{fault}: its descriptor is registered");

        // Another load of the process uses what was kept, and works.
        sim.fail("");
        let model = Model::open(folder.path()).unwrap();
        let loaded = model.load(&options(Preference::Required)).unwrap();
        assert_same_bytes(&model, &loaded);
        assert_eq!(sim.report().calls("cuFileDriverOpen"), 0, "{fault}");
        return;
    }
}

/// Tells whether this process has a file open for direct reads.
fn is_open(path: &Path) -> bool {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    descriptors.flatten().any(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target == path))
}

#[test]
fn what_reads_use_that_nobody_waits_for_is_kept_and_told() {
    let told = |fault: &str| run("processes::reads_that_never_end", &[("FAULT", Path::new(fault))]);
    for fault in ["cuFileBatchIOGetStatus", "cuFileBatchIOSubmit", "direct_told"] {
        let line = told(fault);
        let kept = "2 reads may still be under way, so their memory, files and library are kept until the process ends";
        assert!(line.ends_with(kept), "{line}");
    }
    assert!(told("cuFileBatchRead").contains("part-"), "a lost device's error names the file");
}

/// Writes a copy of the simulator that lacks these functions: their names are overwritten, so that nobody finds them.
fn library_without(folder: &Path, missing: &[&str]) -> PathBuf {
    let mut bytes = std::fs::read(library_path()).unwrap();
    for name in missing {
        let name = format!("\0{name}\0").into_bytes();
        let places: Vec<_> =
            (0..bytes.len() - name.len()).filter(|at| bytes[*at..].starts_with(&name)).collect();
        assert!(!places.is_empty());
        for at in places {
            bytes[at + 1] = b'X';
        }
    }
    let path = folder.join(format!("libsim-without-{}.so", missing.len()));
    std::fs::write(&path, bytes).unwrap();
    path
}
