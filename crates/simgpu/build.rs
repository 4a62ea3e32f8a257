//! Compiles the kernels for the host, and lists them for the simulator by name. Makes the library stay where it was loaded:
//! threads of its streams and its machine outlive the last handle of it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rustc-link-arg-cdylib=-Wl,-z,nodelete");
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The project's kernels, and those that only tests of the simulator launch.
    let (projects, own) = (package.join("../../kernels"), package.join("kernels"));
    let mut sources = Vec::new();
    for folder in [&projects, &own] {
        println!("cargo::rerun-if-changed={}", folder.display());
        let entries = fs::read_dir(folder).expect("a folder of kernels");
        sources.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    sources.retain(|path: &PathBuf| path.extension().is_some_and(|extension| extension == "cc"));
    sources.sort();

    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .cpp_link_stdlib(None)
        // Tests move real bytes. Contraction is off as on the devices, so that every build computes the same bits.
        .opt_level(2)
        .flag("-ffp-contract=off")
        .flag("-fno-exceptions")
        .flag("-Wno-unknown-pragmas")
        .include(&projects)
        .files(&sources)
        .compile("kernels");

    let list = kernels(&sources);
    let mut text = String::from("unsafe extern \"C\" {\n");
    for kernel in &list {
        let _ = writeln!(text, "    fn {kernel}_host(threads: u32, params: *const c_void);");
        let _ = writeln!(text, "    fn {kernel}_params_len() -> u32;");
    }
    text += "}\n\nconst KERNELS: &[HostKernel] = &[\n";
    for kernel in &list {
        let _ = writeln!(
            text,
            "    HostKernel {{ name: {kernel:?}, run: {kernel}_host, params_len: {kernel}_params_len }},"
        );
    }
    text += "];\n";
    text += &ptx(&projects.join("compiled/ptx"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where"));
    fs::write(out.join("kernels.rs"), text).expect("OUT_DIR is writable");
}

/// Returns a list of the modules as PTX, each terminated, as drivers want it.
fn ptx(folder: &Path) -> String {
    println!("cargo::rerun-if-changed={}", folder.display());
    let entries = fs::read_dir(folder).expect("the compiled kernels");
    let mut paths: Vec<_> = entries.filter_map(|entry| entry.ok()?.path().canonicalize().ok()).collect();
    paths.sort();
    let module = |path: &PathBuf| format!("    concat!(include_str!({path:?}), \"\\0\"),\n");
    format!(
        "\n/// The modules as PTX, terminated.\npub(crate) const PTX: &[&str] = &[\n{}];\n",
        paths.iter().map(module).collect::<String>()
    )
}

/// Returns the names of the kernels, which stand in lines `KERNEL(name, Params) {` and `KERNEL_PHASES(name, ..) {`.
fn kernels(sources: &[PathBuf]) -> Vec<String> {
    let mut names = Vec::new();
    for source in sources {
        let text = fs::read_to_string(source).expect("a kernel's source");
        for macro_name in ["KERNEL(", "KERNEL_PHASES("] {
            let heads = text.lines().filter_map(|line| line.strip_prefix(macro_name)?.split_once(','));
            names.extend(heads.map(|(name, _)| name.to_owned()));
        }
    }
    names
}
