//! Help, version, completions: what a person sees first.

use crate::tensorhaul;

const COMMANDS: [&str; 8] =
    ["inspect", "plan", "load", "verify", "convert", "bench", "doctor", "completions"];

#[test]
fn every_command_has_help_with_examples() {
    let help = tensorhaul(["--help"]).ok();
    for command in COMMANDS {
        assert!(help.contains(command), "{command}");
        let help = tensorhaul([command, "--help"]).ok();
        assert!(help.contains("Examples:") && help.contains(&format!("tensorhaul {command}")), "{help}");
    }
}

#[test]
fn the_version_is_the_packages() {
    assert_eq!(tensorhaul(["--version"]).ok(), format!("tensorhaul {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn shells_get_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = tensorhaul(["completions", shell]).ok();
        assert!(COMMANDS.iter().all(|command| script.contains(command)), "{shell}");
    }
}
