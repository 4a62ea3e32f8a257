//! Compiles the kernels for every device, and tells whether the compiled forms that are checked in are up to date.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::workspace::Workspace;
use crate::{Outcome, shell, skip};

/// One major version, because what is checked in is compared byte for byte.
const CLANG: &str = "clang-22";
const STRIP: &str = "llvm-strip-22";
const LINKER: &str = "ld.lld-22";

/// AMD has no portable form: MI200, MI300, MI350, RDNA 2, 3 and 4.
const AMD_ARCHITECTURES: &[&str] = &["gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1201"];

/// What both vendors' builds share. Multiplications and additions stay apart and subnormals are kept, so that every target
/// computes the same bits.
const COMMON: &[&str] = &[
    "--cuda-device-only",
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-gpu-flush-denormals-to-zero",
    "-Wall",
    "-Wextra",
    "-Werror",
];

/// The oldest PTX that has the oldest architecture: every newer driver and device takes it.
const NVIDIA: &[&str] =
    &["-x", "cuda", "--cuda-gpu-arch=sm_80", "--cuda-feature=+ptx70", "-nocudainc", "-nocudalib", "-S"];

/// Code objects of version 5, which ROCm 5 and newer load. Without a fixed cuid every build would differ.
const AMD: &[&str] = &[
    "-x",
    "hip",
    "-nogpuinc",
    "-nogpulib",
    "--no-gpu-bundle-output",
    "-mcode-object-version=5",
    "-cuid=tensorhaul",
];

/// Writes the compiled forms anew, or with `--check` compares them with new ones.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Outcome {
    match args {
        [] => {
            missing_tool().map_or(Ok(()), Err)?;
            compile(workspace, &compiled(workspace))
        }
        [flag] if flag == "--check" => check(workspace),
        _ => Err("kernels takes no argument but --check".to_owned()),
    }
}

/// Compiles into the target folder and compares.
pub(crate) fn check(workspace: &Workspace) -> Outcome {
    if let Some(why) = missing_tool() {
        return skip("kernels", &why);
    }
    let fresh = workspace.target_dir.join("xtask/kernels");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).map_err(|error| format!("{}: {error}", fresh.display()))?;
    }
    compile(workspace, &fresh)?;
    let folders = std::iter::once("ptx").chain(AMD_ARCHITECTURES.iter().copied());
    for folder in folders {
        let kept = crate::test::files(&compiled(workspace).join(folder))?;
        if let Some(difference) =
            crate::test::first_difference(&kept, &crate::test::files(&fresh.join(folder))?)
        {
            return Err(format!(
                "kernels/compiled/{folder}: {difference}; `cargo xtask kernels` writes them anew"
            ));
        }
    }
    Ok(())
}

fn compiled(workspace: &Workspace) -> PathBuf {
    workspace.root.join("kernels/compiled")
}

/// Compiles every kernel for every device.
fn compile(workspace: &Workspace, target: &Path) -> Outcome {
    for source in sources(workspace)? {
        let stem = source.file_stem().unwrap_or_default().to_owned();
        let output = |folder: &str, extension: &str| {
            let folder = target.join(folder);
            fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
            Ok::<PathBuf, String>(folder.join(&stem).with_extension(extension))
        };
        let clang = |options: &[&str], output: &Path| {
            let mut clang = Command::new(CLANG);
            clang.args(options).args(COMMON).arg(&source).arg("-o").arg(output);
            clang
        };
        shell::run(&mut clang(NVIDIA, &output("ptx", "ptx")?))?;
        for architecture in AMD_ARCHITECTURES {
            let object = output(architecture, "hsaco")?;
            shell::run(clang(AMD, &object).arg(format!("--offload-arch={architecture}")))?;
            shell::run(Command::new(STRIP).arg(&object))?;
        }
    }
    Ok(())
}

/// Returns the sources of kernels, each a module of its own.
fn sources(workspace: &Workspace) -> Result<Vec<PathBuf>, String> {
    let folder = workspace.root.join("kernels");
    let entries = fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut sources: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cc"));
    sources.sort();
    Ok(sources)
}

/// Says which of the tools is not here.
fn missing_tool() -> Option<String> {
    let is_missing = |tool: &&str| {
        let version =
            Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        !version.is_ok_and(|status| status.success())
    };
    let missing = [CLANG, STRIP, LINKER].into_iter().find(is_missing)?;
    Some(format!("{missing} is not installed: apt-get install clang-22 lld-22 llvm-22"))
}
