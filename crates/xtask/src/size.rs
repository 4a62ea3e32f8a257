//! Measures the command as people install it.

use std::fs;

use crate::workspace::Workspace;
use crate::{Outcome, shell};

/// Builds the stripped release command and fails when it is longer than the limit.
///
/// Where it is built already, as after the step `readme`, this costs a second. A command that is older than its sources is
/// never measured: cargo decides what is to be built.
pub(crate) fn run(workspace: &Workspace) -> Outcome {
    shell::run(&mut workspace.cargo(&["build", "--release", "--package", PACKAGE]))?;
    let path = workspace.target_dir.join("release").join(COMMAND);
    let len_bytes = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?.len();
    println!("{}", verdict(len_bytes)?);
    Ok(())
}

/// Returns what there is to say of a command of this length.
fn verdict(len_bytes: u64) -> Result<String, String> {
    let fact = format!("the release command `{COMMAND}` has {:.1} MB", len_bytes as f64 / 1e6);
    if len_bytes <= LEN_BYTES_MAX {
        return Ok(format!("{fact} of at most {}", LEN_BYTES_MAX / 1_000_000));
    }
    Err(format!(
        "{fact} ({len_bytes} bytes), which is more than {}; `cargo bloat --release` shows what it is made of",
        LEN_BYTES_MAX / 1_000_000
    ))
}

const PACKAGE: &str = "tensorhaul-cli";
const COMMAND: &str = "tensorhaul";

/// One binary serves machines with and without a GPU: it carries every kernel, and is still to be copied into a container
/// without a thought.
const LEN_BYTES_MAX: u64 = 20_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_over_the_limit_fails_with_both_numbers() {
        assert_eq!(verdict(8_250_000).unwrap(), "the release command `tensorhaul` has 8.2 MB of at most 20");
        assert!(verdict(20_000_000).is_ok());
        let error = verdict(20_000_001).unwrap_err();
        assert!(error.contains("has 20.0 MB (20000001 bytes), which is more than 20"), "{error}");
    }
}
