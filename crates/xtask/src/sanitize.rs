//! Runs the tests of what handles raw memory under AddressSanitizer.

use std::process::{Command, Stdio};

use crate::workspace::Workspace;
use crate::{Outcome, shell, skip};

/// The target is named so that build scripts and procedural macros, which run inside the compiler, are not instrumented.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The crates that hold unsafe code, and the facade that drives them all.
const PACKAGES: &[&str] = &["tensorhaul-stage", "tensorhaul-io", "tensorhaul-device", "tensorhaul"];

pub(crate) fn run(workspace: &Workspace) -> Outcome {
    if !has_nightly() {
        return skip("sanitize", "there is no nightly toolchain: rustup toolchain install nightly");
    }
    // Unit and integration tests: rustdoc would link doc tests without the sanitizer's runtime.
    let mut tests = workspace.cargo(&["+nightly", "test", "--target", TARGET, "--all-features", "--tests"]);
    tests.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
    shell::run(tests.env("RUSTFLAGS", "-Zsanitizer=address"))
}

fn has_nightly() -> bool {
    let version = Command::new("cargo")
        .args(["+nightly", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    version.is_ok_and(|status| status.success())
}
