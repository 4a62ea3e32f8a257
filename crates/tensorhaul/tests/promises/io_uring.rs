//! Without io_uring, or without its registered buffers, the same bytes come, and the report says why.

use std::thread;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use tensorhaul::{EngineChoice, Fallback, Loaded, Model, Preference, Report};

use crate::common::{
    Cache, Folder, GIVE_BACK, assert_consistent, assert_same, awkward, in_own_process, load_with, reference,
    skip,
};
use crate::fallbacks::private;

#[test]
fn io_uring_that_is_refused_falls_back_to_pread_and_says_why() {
    let folder = Folder::on_disk();
    let paths = folder.checkpoint(&awkward());
    let expected = reference(&paths);
    for (engine, cache) in [
        (EngineChoice::IoUring, Cache::Hot),
        (EngineChoice::IoUring, Cache::Cold),
        (EngineChoice::Auto, Cache::Cold),
    ] {
        for errno in [1, 38, 12] {
            let options = private().engine(engine).simulate_io_uring_refusal(errno);
            let Some(loaded) = load_with(cache, folder.path(), &paths, &options) else { continue };
            assert_same(loaded.tensors.iter(), &expected, &format!("{options:?}"));
            assert_eq!(loaded.report.engine, "pread");
            if engine == EngineChoice::Auto && loaded.report.bytes_direct == 0 {
                skip("nothing of this disk is read directly, so nothing asks for io_uring");
                continue;
            }
            let [fallback] = &about_io_uring(&loaded.report)[..] else { panic!("{:?}", loaded.report) };
            assert_eq!(fallback.what, "pread threads read instead of io_uring");
            assert_eq!(fallback.why, std::io::Error::from_raw_os_error(errno).to_string());
            // It reads past the page cache as io_uring would have.
            let is_direct = cache == Cache::Cold && loaded.report.fallbacks.len() == 1;
            assert_eq!(loaded.report.bytes_direct > 0, is_direct, "{:?}", loaded.report);
        }
    }
}

#[test]
fn a_hot_load_needs_no_io_uring_and_reports_no_fallback() {
    let folder = Folder::on_disk();
    let paths = folder.checkpoint(&awkward());
    let options = private().simulate_io_uring_refusal(1);
    let Some(Loaded { report, .. }) = load_with(Cache::Hot, folder.path(), &paths, &options) else { return };
    assert_eq!((report.engine.as_str(), about_io_uring(&report)), ("pread", Vec::new()));
}

#[test]
fn io_uring_forbidden_by_seccomp_falls_back_and_says_why() {
    let folder = Folder::on_disk();
    let paths = folder.checkpoint(&awkward());
    let expected = reference(&paths);
    let path = folder.path().to_owned();
    // The filter holds for the thread that asks for it and those it starts.
    let confined = thread::spawn(move || {
        forbid_io_uring()?;
        Ok::<_, std::io::Error>(load_with(
            Cache::Cold,
            &path,
            &paths,
            &private().engine(EngineChoice::IoUring),
        ))
    });
    match confined.join().unwrap() {
        Ok(None) => {}
        Ok(Some(loaded)) => {
            assert_same(loaded.tensors.iter(), &expected, "under seccomp");
            let [fallback] = &about_io_uring(&loaded.report)[..] else { panic!("{:?}", loaded.report) };
            assert_eq!(fallback.what, "pread threads read instead of io_uring");
            assert_eq!(fallback.why, "Operation not permitted (os error 1)");
            assert_eq!(loaded.report.engine, "pread");
        }
        Err(error) => skip(&format!("seccomp: {error}")),
    }
}

#[test]
fn buffers_beyond_the_locked_memory_limit_are_pinned_one_by_one_and_the_report_says_so() {
    let test =
        "io_uring::buffers_beyond_the_locked_memory_limit_are_pinned_one_by_one_and_the_report_says_so";
    in_own_process(test, || {
        let folder = Folder::on_disk();
        let paths = folder.checkpoint(&awkward());
        let expected = reference(&paths);
        let limit = Rlimit { current: Some(64 << 10), maximum: Some(64 << 10) };
        if let Err(error) =
            setrlimit(Resource::Memlock, limit).and_then(|()| drop_capability(CapabilitySet::IPC_LOCK))
        {
            return skip(&format!("a limit of locked memory that holds for this process: {error}"));
        }
        let options =
            private().engine(EngineChoice::IoUring).in_place(Preference::Off).staging_bytes(1 << 20);
        for cache in [Cache::Hot, Cache::Cold] {
            let Some(loaded) = load_with(cache, folder.path(), &paths, &options) else { continue };
            assert_same(loaded.tensors.iter(), &expected, "under 64 KiB of locked memory");
            assert_consistent(&loaded.report, 1 << 20, "under 64 KiB of locked memory");
            let [Fallback { what, why }] = &about_io_uring(&loaded.report)[..] else {
                panic!("{:?}", loaded.report)
            };
            if what.contains("pread") {
                return skip(&format!("{what}: {why}"));
            }
            assert_eq!(what, "io_uring pins staging buffers for each request");
            assert!(why.contains("needs 1048576 bytes of locked memory, the limit is 65536"), "{why}");
            assert!(why.contains("raise RLIMIT_MEMLOCK"), "{why}");
            assert_eq!(loaded.report.engine, "io-uring");
        }
        // A ring that the limit holds is registered, once the kernel has let go of the io_urings before it: it
        // counts locked memory by user, and takes it back some time after the close.
        let small = options.staging_bytes(16 << 10);
        let deadline = Instant::now() + GIVE_BACK;
        loop {
            let loaded = Model::open(folder.path()).unwrap().load(&small).unwrap();
            assert_same(loaded.tensors.iter(), &expected, "with a ring of 16 KiB");
            if about_io_uring(&loaded.report).is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "{:?}", loaded.report.fallbacks);
        }
    });
}

fn about_io_uring(report: &Report) -> Vec<Fallback> {
    report.fallbacks.iter().filter(|fallback| fallback.what.contains("io_uring")).cloned().collect()
}

/// Gives up a capability of this thread, and of those it starts.
fn drop_capability(capability: CapabilitySet) -> rustix::io::Result<()> {
    let sets = rustix::thread::capabilities(None)?;
    let effective = sets.effective - capability;
    rustix::thread::set_capabilities(None, CapabilitySets { effective, ..sets })
}

/// Makes this thread, and those it starts, get EPERM from `io_uring_setup`, as containers do.
///
/// # Source
/// seccomp(2), linux/filter.h: load the system call's number, compare, return.
fn forbid_io_uring() -> std::io::Result<()> {
    let code = |parts: [u32; 3]| parts.iter().sum::<u32>() as u16;
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let number_offset_bytes = 0;
    let mut filter = [
        statement(code([libc::BPF_LD, libc::BPF_W, libc::BPF_ABS]), number_offset_bytes),
        libc::sock_filter {
            code: code([libc::BPF_JMP, libc::BPF_JEQ, libc::BPF_K]),
            jt: 0,
            jf: 1,
            k: libc::SYS_io_uring_setup as u32,
        },
        statement(code([libc::BPF_RET, libc::BPF_K, 0]), libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(code([libc::BPF_RET, libc::BPF_K, 0]), libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes numbers alone, and changes this thread alone.
    let no_new_privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if no_new_privileges != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the program and its filter live across the call, which copies them.
    match unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, std::ptr::from_ref(&program))
    } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
