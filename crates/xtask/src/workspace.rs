//! Knows what cargo knows about this workspace.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::shell;

/// The workspace that the current folder belongs to.
pub(crate) struct Workspace {
    /// The repository's root.
    pub(crate) root: PathBuf,
    /// Where build outputs go, and what tasks make.
    pub(crate) target_dir: PathBuf,
    packages: Vec<Value>,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn find() -> Result<Workspace, String> {
        let json =
            shell::output(Command::new("cargo").args(["metadata", "--no-deps", "--format-version", "1"]))?;
        let mut metadata: Value =
            serde_json::from_slice(&json).map_err(|error| format!("cargo metadata: {error}"))?;
        let path = |key: &str| PathBuf::from(metadata[key].as_str().unwrap_or_default());
        Ok(Workspace {
            root: path("workspace_root"),
            target_dir: path("target_directory"),
            packages: metadata["packages"].as_array_mut().map(std::mem::take).unwrap_or_default(),
        })
    }

    /// Returns a cargo command to be run in the root.
    pub(crate) fn cargo(&self, args: &[&str]) -> Command {
        let mut command = Command::new("cargo");
        command.current_dir(&self.root).args(args);
        command
    }

    /// Returns the package and the name of every target of a kind: `example`, `bench`.
    pub(crate) fn targets(&self, kind: &str) -> Vec<(&str, &str)> {
        let mut targets = vec![];
        for package in &self.packages {
            for target in package["targets"].as_array().into_iter().flatten() {
                if target["kind"][0] == kind {
                    targets.extend(package["name"].as_str().zip(target["name"].as_str()));
                }
            }
        }
        targets
    }
}
