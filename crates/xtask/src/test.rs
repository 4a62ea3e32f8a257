//! Runs everything a change must pass.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

use crate::workspace::Workspace;
use crate::{Outcome, kernels, shell, size};

struct Step {
    name: &'static str,
    what: &'static str,
    run: fn(&Workspace) -> Outcome,
}

/// Every step in its order: what fails soonest and costs least comes first.
const STEPS: &[Step] = &[
    Step { name: "fmt", what: "the formatting is rustfmt's", run: fmt },
    Step {
        name: "kernels",
        what: "the compiled kernels are what their sources compile to",
        run: kernels::check,
    },
    Step { name: "clippy", what: "clippy has no warning", run: clippy },
    Step { name: "tests", what: "every unit, integration and doc test passes", run: tests },
    Step { name: "doc", what: "the documentation builds without a warning", run: doc },
    Step { name: "model", what: "the tiny-llama in the repository is what its generator writes", run: model },
    Step { name: "examples", what: "every example runs", run: examples },
    Step { name: "benches", what: "every bench runs once", run: benches },
    Step { name: "readme", what: "the first command of the README works", run: readme },
    // Behind the step above, which has built it.
    Step { name: "size", what: "the release command is at most 20 MB long", run: size::run },
];

/// Runs the steps named in `args`, or all, and stops at the first that fails; `--list` prints them instead.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Outcome {
    if args == ["--list"] {
        STEPS.iter().for_each(|step| println!("{:10}{}", step.name, step.what));
        return Ok(());
    }
    if let Some(unknown) = args.iter().find(|arg| STEPS.iter().all(|step| step.name != **arg)) {
        return Err(format!("there is no step `{unknown}`; `cargo xtask test --list` prints them"));
    }

    let mut times = vec![];
    for step in STEPS.iter().filter(|step| args.is_empty() || args.iter().any(|arg| arg == step.name)) {
        println!("\n== {}: {}", step.name, step.what);
        let start = Instant::now();
        let outcome = (step.run)(workspace);
        let time = format!("{} {:.1} s", step.name, start.elapsed().as_secs_f64());
        outcome.map_err(|why| {
            format!("step FAILED: {time}: {why}\nxtask: it runs alone by: cargo xtask test {}", step.name)
        })?;
        println!("== passed: {time}");
        times.push(time);
    }
    println!("\nxtask test: all passed: {}", times.join(", "));
    Ok(())
}

fn fmt(workspace: &Workspace) -> Outcome {
    shell::run(&mut workspace.cargo(&["fmt", "--all", "--check"]))
}

fn clippy(workspace: &Workspace) -> Outcome {
    let args = ["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"];
    shell::run(&mut workspace.cargo(&args))
}

fn tests(workspace: &Workspace) -> Outcome {
    shell::run(&mut workspace.cargo(&["test", "--workspace", "--all-features"]))
}

fn doc(workspace: &Workspace) -> Outcome {
    let args = ["doc", "--workspace", "--no-deps", "--all-features"];
    shell::run(workspace.cargo(&args).env("RUSTDOCFLAGS", "-D warnings"))
}

const MODEL_GENERATOR: &str = "make_tiny_llama";

fn model(workspace: &Workspace) -> Outcome {
    let written = workspace.target_dir.join("xtask/tiny-llama");
    if written.exists() {
        fs::remove_dir_all(&written).map_err(|error| format!("{}: {error}", written.display()))?;
    }
    let args = ["run", "--package", "tensorhaul-examples", "--example", MODEL_GENERATOR, "--"];
    shell::run(workspace.cargo(&args).arg(&written))?;

    let kept = files(&workspace.root.join("examples/models/tiny-llama"))?;
    match first_difference(&kept, &files(&written)?) {
        None => Ok(()),
        Some(difference) => Err(format!(
            "examples/models/tiny-llama: {difference}; if the generator is right, `cargo {}` writes it anew",
            args[..args.len() - 1].join(" ")
        )),
    }
}

fn examples(workspace: &Workspace) -> Outcome {
    for (package, name) in workspace.targets("example") {
        // With no argument the generator would overwrite what the step `model` compares.
        if name != MODEL_GENERATOR {
            println!("-- example {name}");
            let args = ["run", "--all-features", "--package", package, "--example", name];
            shell::run(&mut workspace.cargo(&args))?;
        }
    }
    Ok(())
}

fn benches(workspace: &Workspace) -> Outcome {
    let benches = workspace.targets("bench");
    if benches.is_empty() {
        return Ok(()); // `cargo bench` without a name would build and run the unit tests again.
    }
    // One command for all, so that what they share is built once.
    let mut bench = workspace.cargo(&["bench", "--workspace", "--all-features"]);
    bench.args(benches.iter().flat_map(|(_, name)| ["--bench", name]));
    shell::run(bench.args(["--", "--test"]))
}

fn readme(workspace: &Workspace) -> Outcome {
    let readme = fs::read_to_string(workspace.root.join("README.md"))
        .map_err(|error| format!("README.md: {error}"))?;
    let command = first_command(&readme).ok_or("README.md has no code block that begins with a command")?;
    println!("-- {command}");
    match command.split_whitespace().collect::<Vec<_>>().as_slice() {
        ["cargo", args @ ..] => shell::run(&mut workspace.cargo(args)),
        _ => Err(format!("README.md: the first command is to be a cargo command, not `{command}`")),
    }
}

/// Returns the first line of the first code block, without a trailing comment.
fn first_command(markdown: &str) -> Option<&str> {
    let mut lines = markdown.lines().map(str::trim);
    lines.find(|line| line.starts_with("```"))?;
    let line = lines.find(|line| !line.is_empty())?;
    let command = line.split(" #").next().unwrap_or(line).trim();
    (!command.starts_with("```")).then_some(command)
}

/// Reads the files of a folder that has no folders.
pub(crate) fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let in_folder = |error: io::Error| format!("{}: {error}", folder.display());
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(in_folder)? {
        let entry = entry.map_err(in_folder)?;
        let bytes = fs::read(entry.path()).map_err(in_folder)?;
        files.insert(entry.file_name().display().to_string(), bytes);
    }
    Ok(files)
}

pub(crate) fn first_difference(
    kept: &BTreeMap<String, Vec<u8>>,
    written: &BTreeMap<String, Vec<u8>>,
) -> Option<String> {
    for (name, kept) in kept {
        let Some(written) = written.get(name) else {
            return Some(format!("{name} is not written by the generator"));
        };
        if kept != written {
            let offset = kept.iter().zip(written).take_while(|(kept, written)| kept == written).count();
            let (kept, written) = (kept.len(), written.len());
            return Some(format!(
                "{name} ({kept} bytes) and the generator's ({written}) differ from byte {offset}"
            ));
        }
    }
    let missing = written.keys().find(|name| !kept.contains_key(*name))?;
    Some(format!("{missing} is missing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_command_is_the_first_line_of_the_first_code_block() {
        let markdown =
            "# Title\n\nSome `code`.\n\n```sh\ncargo run -- load PATH   # loads\ncargo xtask test\n```\n";
        assert_eq!(first_command(markdown), Some("cargo run -- load PATH"));
        assert_eq!(first_command("# Title\n\nNo block.\n"), None);
        assert_eq!(first_command("```\n```\ntext\n"), None);
    }

    #[test]
    fn a_difference_names_the_file_and_the_byte() {
        let folder = |files: &[(&str, &str)]| {
            files.iter().map(|(name, bytes)| (name.to_string(), bytes.as_bytes().to_vec())).collect()
        };
        let kept = folder(&[("a", "one"), ("b", "two")]);
        assert_eq!(first_difference(&kept, &kept), None);
        let difference = |written| first_difference(&kept, &folder(written)).unwrap();
        assert_eq!(difference(&[("a", "one")]), "b is not written by the generator");
        assert_eq!(difference(&[("a", "one"), ("b", "two"), ("c", "")]), "c is missing");
        let expected = "b (3 bytes) and the generator's (4) differ from byte 2";
        assert_eq!(difference(&[("a", "one"), ("b", "twin")]), expected);
    }
}
