//! Runs the tests of what handles raw memory under AddressSanitizer.

use std::process::{Command, Stdio};

use crate::workspace::Workspace;
use crate::{Outcome, shell, skip};

/// The target is named so that build scripts and procedural macros, which run inside the compiler, are not instrumented.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The crates that hold unsafe code, and the facade that drives them all.
const PACKAGES: &[&str] = &["tensorhaul-stage", "tensorhaul-io", "tensorhaul-device", "tensorhaul"];

/// The GPU backends over simulated drivers, whose memory they write and free.
const SIMULATED: &[&str] = &["tensorhaul-simgpu"];

/// The simulated driver is opened at run time and has no runtime of the sanitizer in it: it uses the one of
/// the test that opens it, which has to export its symbols.
const RUSTFLAGS: &str = "-Zsanitizer=address -Clink-args=-rdynamic";

pub(crate) fn run(workspace: &Workspace) -> Outcome {
    if !has_nightly() {
        return skip("sanitize", "there is no nightly toolchain: rustup toolchain install nightly");
    }
    shell::run(&mut tests(workspace, PACKAGES))?;
    // Memory that a failed device may still touch is leaked on purpose, and tests of faults provoke that: leaks are
    // counted by the simulated driver instead, in every test without a fault.
    shell::run(tests(workspace, SIMULATED).env("ASAN_OPTIONS", "detect_leaks=0"))
}

/// Unit and integration tests: rustdoc would link doc tests without the sanitizer's runtime.
fn tests(workspace: &Workspace, packages: &[&str]) -> Command {
    let mut tests = workspace.cargo(&["+nightly", "test", "--target", TARGET, "--all-features", "--tests"]);
    tests.args(packages.iter().flat_map(|package| ["--package", package])).env("RUSTFLAGS", RUSTFLAGS);
    tests
}

fn has_nightly() -> bool {
    let version = Command::new("cargo")
        .args(["+nightly", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    version.is_ok_and(|status| status.success())
}
