//! Runs the fuzz targets.

use std::process::Command;

use crate::workspace::Workspace;
use crate::{Outcome, shell};

/// Passes the arguments on to `fuzz/run.sh`, which says what it needs and what it found.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Outcome {
    shell::run(Command::new("bash").arg("fuzz/run.sh").args(args).current_dir(&workspace.root))
}
