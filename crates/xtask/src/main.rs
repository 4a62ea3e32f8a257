//! Runs the repository's tasks: `cargo xtask help` lists them.

mod fuzz;
mod kernels;
mod proof;
mod sanitize;
mod shell;
mod size;
mod test;
mod workspace;

use std::env;
use std::process::ExitCode;

use crate::workspace::Workspace;

/// What a task leaves behind when it fails: one sentence for the person who ran it.
type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Outcome {
    let Some((task, args)) = args.split_first() else {
        return help();
    };
    match task.as_str() {
        "test" => test::run(&Workspace::find()?, args),
        "fuzz" => fuzz::run(&Workspace::find()?, args),
        "kernels" => kernels::run(&Workspace::find()?, args),
        "size" => size::run(&Workspace::find()?),
        "sanitize" => sanitize::run(&Workspace::find()?),
        "proof" => proof::run(&Workspace::find()?),
        "help" | "--help" | "-h" => help(),
        unknown => Err(format!("there is no task `{unknown}`; `cargo xtask help` lists them")),
    }
}

fn help() -> Outcome {
    print!("{HELP}");
    Ok(())
}

/// Reports that a task can't run on this machine: a message for a person, a failure where CI expects it to run.
fn skip(task: &str, why: &str) -> Outcome {
    if env::var_os("CI").is_some_and(|ci| ci == "true") {
        return Err(format!("{task} must run when CI=true, but {why}"));
    }
    println!("xtask: {task} SKIPPED: {why}");
    Ok(())
}

const HELP: &str = "\
Usage: cargo xtask TASK

  test              everything a change must pass, step by step, up to the first failure
  test --list       the steps
  test STEP...      only these
  kernels           the compiled forms of kernels/, written anew (clang-22, lld-22, llvm-22)
  kernels --check   whether they are what the sources compile to, byte for byte
  fuzz [ARG...]     every fuzz target for a minute: fuzz/run.sh with these arguments (nightly, cargo-fuzz)
  size              whether the release command, stripped, is at most 20 MB long
  sanitize          the tests that handle raw memory, under AddressSanitizer (nightly)
  proof             a real model of 91 MB, compared byte for byte with the safetensors Python package; ranks with transformers' plan (network)
  help              this text

kernels --check, sanitize and proof say so and succeed where the machine lacks what they need; with CI=true they fail.
";
