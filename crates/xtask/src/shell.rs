//! Runs other programs.

use std::fmt::Write as _;
use std::process::{Command, Stdio};

use crate::Outcome;

/// Runs a program to its end, its output on the terminal; anything but success is an error naming the command line.
pub(crate) fn run(command: &mut Command) -> Outcome {
    let status = command.status().map_err(|error| format!("`{}`: {error}", line(command)))?;
    if status.success() { Ok(()) } else { Err(format!("`{}`: {status}", line(command))) }
}

/// Runs a program and returns what it prints on stdout.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>, String> {
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("`{}`: {error}", line(command)))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("`{}`: {}", line(command), output.status))
    }
}

/// Returns the command as a person would type it.
fn line(command: &Command) -> String {
    let mut line = String::new();
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            let _ = write!(line, "{}={:?} ", key.display(), value);
        }
    }
    line += &command.get_program().to_string_lossy();
    for arg in command.get_args() {
        let _ = write!(line, " {}", arg.display());
    }
    line
}
