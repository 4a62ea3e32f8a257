//! Files that are not what they should be, and requests that cannot be: an error whose kind says whose move
//! it is, and whose text names the file, the tensor and what would work. Never a panic, never a hang.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use rustix::thread::{CapabilitySet, CapabilitySets};
use tensorhaul::{
    DeviceId, Dtype, EngineChoice, Error, ErrorKind, Handover, LoadOptions, Model, Preference, Request,
    Select, Slice,
};

use crate::common::{
    Folder, GIVE_BACK, assert_same, awkward, encode, in_own_process, reference, skip, stored,
};

#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    let folder = Folder::on_disk();
    let cases = [("empty.safetensors", ""), ("short.safetensors", "1234567")];
    for (name, text) in cases {
        let error = refused(&folder.write(name, text.as_bytes()), ErrorKind::Malformed);
        assert!(error.one_line().contains("8"), "the prefix has eight bytes: {error:?}");
        assert_eq!(error.file(), Some(&*folder.path().join(name)));
    }
    let missing = refused(&folder.path().join("missing.safetensors"), ErrorKind::NotFound);
    assert!(missing.one_line().contains("missing.safetensors"), "{missing:?}");

    let directory = folder.path().join("directory.safetensors");
    fs::create_dir(&directory).unwrap();
    let error = refused(&directory, ErrorKind::NotFound);
    assert!(error.one_line().contains("no .safetensors file"), "an empty folder: {error:?}");
    fs::create_dir(directory.join("a.safetensors")).unwrap();
    let nested = refused(&directory, ErrorKind::NotFound);
    assert!(nested.one_line().ends_with("a.safetensors: is a directory, not a regular file"), "{nested:?}");
}

#[test]
fn a_folder_with_some_of_the_files_of_a_checkpoint_is_not_loaded_as_if_they_were_all() {
    let folder = Folder::on_disk();
    for number in [1, 3] {
        let file = encode(&[stored(&format!("w{number}"), Dtype::U8, &[4])], 0);
        folder.write(&format!("model-0000{number}-of-00003.safetensors"), &file);
    }
    let error = refused(folder.path(), ErrorKind::Malformed);
    assert!(error.one_line().contains("holds 2 of the 3 files of \"model\", and no index"), "{error:?}");
    folder.write("model-00002-of-00003.safetensors", &encode(&[stored("w2", Dtype::U8, &[4])], 0));
    assert_eq!(Model::open(folder.path()).unwrap().checkpoint().len(), 3);

    folder.write("model.safetensors.index.json", br#"{"weight_map":{}}"#);
    let error = refused(folder.path(), ErrorKind::Malformed);
    assert!(error.one_line().ends_with("index.json: lists no tensor"), "{error:?}");
}

#[test]
fn errors_name_the_tensor_also_when_its_name_is_a_letter() {
    let folder = Folder::on_disk();
    let path = folder.write("cut.safetensors", &encode(&[stored("a", Dtype::U8, &[100_000])], 0));
    let model = Model::open(&path).unwrap();
    resize(&path, 5000);
    let error = model.load(&LoadOptions::default().engine(EngineChoice::Pread)).map(drop).unwrap_err();
    assert!(error.one_line().contains("tensor \"a\": "), "{error:?}");
}

#[test]
fn a_fifo_is_refused_and_never_waited_for() {
    let folder = Folder::on_disk();
    for name in ["pipe.safetensors", "model.safetensors.index.json"] {
        let path = folder.path().join(name);
        make_fifo(&path);
        let (sender, refused) = mpsc::channel();
        let open = path.clone();
        thread::spawn(move || sender.send(Model::open(open).map(drop)));
        let error =
            refused.recv_timeout(GIVE_BACK).expect("opening a FIFO does not wait for a writer").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.one_line().ends_with(&format!("{name}: is a FIFO, not a regular file")), "{error:?}");
    }
}

#[test]
fn an_unreadable_file_is_refused_with_the_systems_reason() {
    let folder = Folder::on_disk();
    let path = folder.write("secret.safetensors", &encode(&[stored("w", Dtype::U8, &[4])], 0));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    // Capabilities belong to threads: this one gives up those that let root read everything.
    let unprivileged = thread::spawn(move || {
        without_capabilities(CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH)
            .then(|| Model::open(path).map(drop))
    });
    match unprivileged.join().unwrap() {
        Some(result) => {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound);
            assert!(
                error.one_line().contains("secret.safetensors: cannot be opened: Permission denied"),
                "{error:?}"
            );
        }
        None => skip("this thread cannot give up its capabilities"),
    }
}

#[test]
fn a_file_cut_short_between_open_and_load_is_an_error() {
    for way in every_way() {
        for cut in [0, 100, 4096 + 10, 300_000] {
            let folder = Folder::on_disk();
            let tensors = [stored("first", Dtype::U8, &[200_000]), stored("second", Dtype::F32, &[60_000])];
            let path = folder.write("cut.safetensors", &encode(&tensors, 0));
            let model = Model::open(&path).unwrap();
            resize(&path, cut);
            let error = model.load(&way).map(drop).unwrap_err();
            let context = format!("cut to {cut}, {way:?}: {error:?}");
            assert_eq!(error.kind(), ErrorKind::Malformed, "{context}");
            assert_eq!(error.file(), Some(&*path), "{context}");
            let line = error.one_line();
            assert!(line.contains("the file ends ") || line.contains(&format!("{cut} now")), "{context}");
            if line.contains("the file ends at") {
                assert_eq!(error.tensor(), Some(if cut < 204_096 { "first" } else { "second" }), "{context}");
            }
        }
    }
}

#[test]
fn a_file_written_to_between_open_and_load_is_an_error() {
    for way in every_way() {
        let folder = Folder::on_disk();
        let path = folder.write("grows.safetensors", &encode(&[stored("w", Dtype::U8, &[100_000])], 0));
        let (model, len) = (Model::open(&path).unwrap(), path.metadata().unwrap().len());
        resize(&path, len + 5000);
        let error = model.load(&way).map(drop).unwrap_err();
        let expected = format!(
            "grows.safetensors: was written to while it was read: {len} bytes when it was opened, {} now",
            len + 5000
        );
        assert!(
            error.kind() == ErrorKind::Malformed && error.one_line().ends_with(&expected),
            "{way:?}: {error:?}"
        );

        let path = folder.write("changes.safetensors", &encode(&[stored("w", Dtype::U8, &[100_000])], 0));
        let model = Model::open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(
            &File::options().write(true).open(&path).unwrap(),
            &[1],
            50_000,
        )
        .unwrap();
        let error = model.load(&way).map(drop).unwrap_err();
        assert!(
            error.one_line().ends_with("was written to while it was read (104096 bytes)"),
            "{way:?}: {error:?}"
        );
    }
}

#[test]
fn a_file_cut_short_between_two_uses_of_its_mapping_is_an_error_and_not_a_signal() {
    let folder = Folder::on_disk();
    let path = folder.write("cut.safetensors", &encode(&[stored("w", Dtype::U8, &[100_000])], 0));
    let model = Model::open(&path).unwrap();
    let options = LoadOptions::default();
    model.load(&options).unwrap();
    model.tensor("w").unwrap();
    resize(&path, 5000);
    let part = Slice::new([0..10]);
    let again = [
        model.load(&options).map(drop),
        model.load(&options.clone().resident(true)).map(drop),
        model.tensor("w").map(drop),
        model.slice("w", &part).map(drop),
    ];
    for (number, result) in again.into_iter().enumerate() {
        let error = result.expect_err(&format!("use {number}"));
        assert_eq!(error.kind(), ErrorKind::Malformed, "use {number}: {error:?}");
    }
}

#[test]
fn a_replaced_file_does_not_disturb_a_model_that_is_open() {
    let folder = Folder::on_disk();
    let path = folder.write("model.safetensors", &encode(&[stored("w", Dtype::F32, &[50_000])], 1));
    let (model, expected) = (Model::open(&path).unwrap(), reference(std::slice::from_ref(&path)));
    let other = folder.write("other", &encode(&[stored("other", Dtype::F32, &[3])], 0));
    fs::rename(other, &path).unwrap();
    for way in every_way() {
        assert_same(model.load(&way).unwrap().tensors.iter(), &expected, &format!("{way:?}"));
    }
}

#[test]
fn an_index_that_is_wrong_says_which_tensor_and_which_file() {
    let a = || vec![stored("a", Dtype::U8, &[8])];
    let b = || vec![stored("b", Dtype::U8, &[8])];
    let check = |listed: &[(&str, &str)], kind, tensor: Option<&str>, text: &str| {
        let folder = Folder::on_disk();
        folder.write("1.safetensors", &encode(&a(), 0));
        folder.write("2.safetensors", &encode(&b(), 0));
        let index = folder.index(listed);
        let error = refused(folder.path(), kind);
        assert_eq!((error.tensor(), error.file()), (tensor, Some(&*index)), "{error:?}");
        assert!(error.one_line().contains(text), "{text}: {error:?}");
    };
    let (one, two) = ("1.safetensors", "2.safetensors");
    for escape in
        ["../1.safetensors", "/etc/passwd", "sub/1.safetensors", "..", "a\\b", "", "c:1", "1.safetensors\0"]
    {
        check(&[("a", escape)], ErrorKind::Malformed, Some("a"), "the files must lie beside the index");
    }
    check(&[("a", one), ("b", "3.safetensors")], ErrorKind::NotFound, None, "3.safetensors");
    check(&[("a", one), ("missing", two)], ErrorKind::Malformed, Some("missing"), "no file has it");
    // The file that has it is not listed at all.
    check(
        &[("a", two), ("b", two)],
        ErrorKind::Malformed,
        Some("a"),
        "listed for \"2.safetensors\", but it is in \"1.safetensors\"",
    );
    check(
        &[("a", one), ("b", one), ("a ", two)],
        ErrorKind::Malformed,
        Some("b"),
        "it is in \"2.safetensors\"",
    );
    check(&[("a", one), ("a", two)], ErrorKind::Malformed, Some("a"), "twice");
}

#[test]
fn a_tensor_in_two_files_is_an_error_with_an_index_and_without() {
    let folder = Folder::on_disk();
    let both = || vec![stored("both", Dtype::U8, &[8])];
    folder.write("1.safetensors", &encode(&both(), 0));
    folder.write("2.safetensors", &encode(&both(), 0));
    let error = refused(folder.path(), ErrorKind::Malformed);
    assert_eq!(error.tensor(), Some("both"));
    assert!(
        error.one_line().contains("1.safetensors") && error.one_line().contains("2.safetensors"),
        "{error:?}"
    );
    folder.index(&[("both", "1.safetensors"), ("other", "2.safetensors")]);
    let error = refused(folder.path(), ErrorKind::Malformed);
    assert_eq!(error.tensor(), Some("both"));
    assert!(
        error.one_line().contains("1.safetensors") && error.one_line().contains("2.safetensors"),
        "{error:?}"
    );
}

#[test]
fn an_index_that_is_no_index_is_malformed() {
    let folder = Folder::on_disk();
    for text in [
        "",
        "{",
        "[]",
        "{}",
        "{\"weight_map\": []}",
        "{\"weight_map\": {\"a\": 1}}",
        "{\"weight_map\":{},\"weight_map\":{}}",
        "\u{0}",
    ] {
        let index = folder.write("model.safetensors.index.json", text.as_bytes());
        let error = refused(folder.path(), ErrorKind::Malformed);
        assert_eq!(error.file(), Some(&*index), "{text:?}: {error:?}");
    }
    folder.write("model.safetensors.index.json", b"{\"weight_map\": {\"\xff\": \"1.safetensors\"}}");
    refused(folder.path(), ErrorKind::Malformed);
}

#[test]
fn a_symbolic_link_may_stay_in_its_folder_and_not_leave_it() {
    let outside = Folder::on_disk();
    let target = outside.write("outside.safetensors", &encode(&[stored("a", Dtype::U8, &[8])], 0));
    for has_index in [false, true] {
        let folder = Folder::on_disk();
        symlink(&target, folder.path().join("1.safetensors")).unwrap();
        if has_index {
            folder.index(&[("a", "1.safetensors")]);
        }
        let error = refused(folder.path(), ErrorKind::Malformed);
        assert!(
            error.one_line().contains("1.safetensors: is a symbolic link that leaves its folder"),
            "{error:?}"
        );
        // By its own name, the caller has chosen it.
        Model::open(folder.path().join("1.safetensors")).unwrap();

        fs::remove_file(folder.path().join("1.safetensors")).unwrap();
        fs::copy(&target, folder.path().join("bytes")).unwrap();
        symlink("bytes", folder.path().join("1.safetensors")).unwrap();
        assert_eq!(Model::open(folder.path()).unwrap().checkpoint().len(), 1);
    }
}

#[test]
fn a_model_of_the_hugging_face_cache_opens_by_folder_and_by_name() {
    in_own_process("bad_input::a_model_of_the_hugging_face_cache_opens_by_folder_and_by_name", || {
        let cache = Folder::on_disk();
        let model = cache.path().join("models--org--name");
        let snapshot = model.join("snapshots/0123abcd");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(model.join("blobs")).unwrap();
        fs::create_dir_all(model.join("refs")).unwrap();
        fs::write(model.join("refs/main"), "0123abcd\n").unwrap();
        let blob = model.join("blobs/5a5a");
        fs::write(&blob, encode(&[stored("w", Dtype::F16, &[9])], 0)).unwrap();
        symlink("../../blobs/5a5a", snapshot.join("model.safetensors")).unwrap();
        let expected = reference(&[blob]);
        // SAFETY: no other thread of this process reads the environment: it runs this test alone.
        unsafe { std::env::set_var("HF_HUB_CACHE", cache.path()) };
        for path in [snapshot.as_path(), Path::new("org/name")] {
            let loaded = Model::open(path).unwrap().load(&LoadOptions::default()).unwrap();
            assert_same(loaded.tensors.iter(), &expected, &path.display().to_string());
        }
        assert_eq!(Model::open("org/name").unwrap().folder(), snapshot);

        refused(Path::new("org/other"), ErrorKind::NotFound);
        fs::write(model.join("refs/main"), "../../../etc").unwrap();
        refused(Path::new("org/name"), ErrorKind::Malformed);
        fs::write(model.join("refs/main"), "4567").unwrap();
        let error = refused(Path::new("org/name"), ErrorKind::NotFound);
        assert!(error.one_line().contains("no snapshot"), "{error:?}");
        // A link out of the snapshot to anything but the model's own blobs.
        fs::remove_file(snapshot.join("model.safetensors")).unwrap();
        symlink("../../../../escape", snapshot.join("model.safetensors")).unwrap();
        fs::write(cache.path().parent().unwrap().join("escape"), encode(&[], 0)).unwrap();
        refused(&snapshot, ErrorKind::Malformed);
        fs::remove_file(cache.path().parent().unwrap().join("escape")).unwrap();
    });
}

#[test]
fn a_shape_of_two_to_the_63_is_an_error_in_the_header_and_never_an_allocation() {
    let folder = Folder::on_disk();
    let cases: [(&str, &[u64], &str); 4] = [
        ("U8", &[1 << 63], "more bits than a 64-bit number counts"),
        ("F64", &[1 << 63], "more bits than a 64-bit number counts"),
        ("U8", &[1 << 32, 1 << 32], "more bits than a 64-bit number counts"),
        ("F32", &[u64::MAX, 1], "more bits than a 64-bit number counts"),
    ];
    for (dtype, shape, text) in cases {
        let json = format!("{{\"w\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[0,8]}}}}");
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend_from_slice(&[0; 8]);
        let error = refused(&folder.write("huge.safetensors", &bytes), ErrorKind::Malformed);
        assert_eq!(error.tensor(), Some("w"));
        assert!(error.one_line().contains(text), "{text}: {error:?}");
    }
}

#[test]
fn a_staging_budget_below_one_buffer_says_what_the_least_is() {
    let folder = Folder::on_disk();
    folder.checkpoint(&awkward());
    let model = Model::open(folder.path()).unwrap();
    for staging_bytes in [0, 1, 4095] {
        for options in every_way() {
            let options = options.staging_bytes(staging_bytes);
            let error = model.load(&options).map(drop).unwrap_err();
            let text = format!(
                "a staging budget of {staging_bytes} bytes holds no buffer; the smallest is 4096 bytes"
            );
            assert_eq!((error.kind(), error.one_line()), (ErrorKind::BadRequest, text), "{options:?}");
        }
        assert!(model.plan(&LoadOptions::default().staging_bytes(staging_bytes)).is_err());
    }
    model.load(&LoadOptions::default().handover(Handover::Private).staging_bytes(4096)).unwrap();
}

#[test]
fn a_result_beyond_its_budget_is_refused_before_anything_is_read() {
    let folder = Folder::on_disk();
    folder.checkpoint(&awkward());
    let model = Model::open(folder.path()).unwrap();
    let private = LoadOptions::default().handover(Handover::Private);
    let needed = model.plan(&private).unwrap().promised().target_bytes;
    let with_budget = |bytes| {
        let mut request = Request::all();
        request.target_bytes_max = Some(bytes);
        private.clone().request(request)
    };
    let error = model.load(&with_budget(needed - 1)).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert_eq!(error.one_line(), format!("the result takes {needed} bytes, the budget is {}", needed - 1));
    model.load(&with_budget(needed)).unwrap();
}

#[test]
fn requests_for_what_is_not_there_say_so() {
    let folder = Folder::on_disk();
    folder.checkpoint(&awkward());
    let model = Model::open(folder.path()).unwrap();
    let error = |select| {
        let options = LoadOptions::default().request(Request::of(select));
        let mapped = model.load(&options).map(drop).unwrap_err();
        let private = model.load(&options.handover(Handover::Private)).map(drop).unwrap_err();
        assert_eq!((mapped.kind(), mapped.one_line()), (private.kind(), private.one_line()));
        assert_eq!(mapped.kind(), ErrorKind::BadRequest);
        mapped
    };
    let text = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let count = model.checkpoint().len();
    let unknown = error(Select::Names(text(&["scalar", "lm_head"])));
    assert_eq!(unknown.tensor(), Some("lm_head"));
    assert_eq!(unknown.one_line(), format!("no tensor is named \"lm_head\" (the checkpoint has {count})"));
    let nothing = error(Select::Globs(text(&["model.*", "vision.*"])));
    assert_eq!(nothing.one_line(), format!("no tensor matches \"vision.*\" (the checkpoint has {count})"));
    let bad = error(Select::Globs(text(&["layers.[0-"])));
    assert!(bad.one_line().starts_with("\"layers.[0-\" is not a glob: "), "{bad:?}");

    assert_eq!(model.tensor("lm_head").unwrap_err().one_line(), unknown.one_line());
    assert_eq!(model.slice("lm_head", &Slice::new([])).unwrap_err().kind(), ErrorKind::BadRequest);
}

#[test]
fn options_that_contradict_each_other_say_what_works() {
    let folder = Folder::on_disk();
    folder.checkpoint(&awkward());
    let model = Model::open(folder.path()).unwrap();
    let mapped = LoadOptions::default().handover(Handover::Mapped);
    let mut sliced = Request::all();
    sliced.slices = vec![("model.norm.weight".to_owned(), Slice::new([0..3]))];
    let cases = [
        (mapped.clone().engine(EngineChoice::Pread), "private hand-over works"),
        (mapped.clone().engine(EngineChoice::IoUring), "private hand-over works"),
        (mapped.clone().in_place(Preference::Off), "private hand-over works"),
        (mapped.request(sliced), "private hand-over works"),
    ];
    for (options, text) in cases {
        let error = model.load(&options).map(drop).unwrap_err();
        assert!(
            error.kind() == ErrorKind::BadRequest && error.one_line().contains(text),
            "{options:?}: {error:?}"
        );
    }
}

#[test]
fn a_device_that_is_not_there_is_an_error_naming_its_vendor() {
    let folder = Folder::on_disk();
    folder.checkpoint(&awkward());
    let model = Model::open(folder.path()).unwrap();
    for (device, vendor) in [(DeviceId::Cuda(97), "cuda:"), (DeviceId::Rocm(97), "rocm:")] {
        let mut request = Request::all();
        request.device = device;
        let error = model.load(&LoadOptions::default().request(request)).map(drop).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Device | ErrorKind::BadRequest), "{error:?}");
        assert!(error.one_line().contains(vendor), "{error:?}");
    }
}

#[test]
fn more_files_than_descriptors_is_an_error_naming_the_file() {
    in_own_process(
        "bad_input::more_files_than_descriptors_is_an_error_naming_the_file",
        more_files_than_descriptors,
    );
}

fn more_files_than_descriptors() {
    let folder = Folder::on_disk();
    for number in 0..60 {
        let path = folder.path().join(format!("{number:04}.safetensors"));
        fs::write(path, encode(&[stored(&format!("w{number}"), Dtype::U8, &[100])], 0)).unwrap();
    }
    let limit = rustix::process::Rlimit { current: Some(40), maximum: Some(40) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let error = refused(folder.path(), ErrorKind::Io);
    assert!(error.one_line().contains("Too many open files") && error.file().is_some(), "{error:?}");
}

/// Opens what must be refused.
fn refused(path: &Path, kind: ErrorKind) -> Error {
    match Model::open(path) {
        Ok(model) => panic!("{} opened: {model:?}", path.display()),
        Err(error) => {
            assert_eq!(error.kind(), kind, "{}: {error:?}", path.display());
            error
        }
    }
}

/// Every way to bring the bytes in that touches them before it returns.
fn every_way() -> Vec<LoadOptions> {
    let private = LoadOptions::default().handover(Handover::Private);
    let mut ways = vec![
        LoadOptions::default(),
        LoadOptions::default().resident(true),
        LoadOptions::default().checksums(true),
    ];
    for engine in [EngineChoice::Auto, EngineChoice::Mmap, EngineChoice::Pread, EngineChoice::IoUring] {
        ways.push(private.clone().engine(engine));
        ways.push(private.clone().engine(engine).in_place(Preference::Off).staging_bytes(64 << 10));
    }
    ways
}

fn resize(path: &Path, len_bytes: u64) {
    File::options().write(true).open(path).unwrap().set_len(len_bytes).unwrap();
}

fn make_fifo(path: &Path) {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

/// Gives up capabilities of this thread; false where the system does not let it.
fn without_capabilities(given_up: CapabilitySet) -> bool {
    let Ok(sets) = rustix::thread::capabilities(None) else { return false };
    let effective = sets.effective - given_up;
    rustix::thread::set_capabilities(None, CapabilitySets { effective, ..sets }).is_ok()
}
