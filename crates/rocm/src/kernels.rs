//! The compiled kernels, as code objects: one for each architecture.

macro_rules! code_objects {
    ($($architecture:literal)*; $modules:tt) => {
        &[$(($architecture, modules!($architecture, $modules))),*]
    };
}

macro_rules! modules {
    ($architecture:literal, [$($module:literal),*]) => {
        &[$(($module, {
            const IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(
                "../../../kernels/compiled/", $architecture, "/", $module, ".hsaco"
            )));
            &IMAGE.0
        })),*]
    };
}

/// Code objects are read as structs of up to 8 bytes; lines of the cache cost no more.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// A module's name and its code object.
type Image = (&'static str, &'static [u8]);

/// The modules of `kernels/` for each architecture: MI200, MI300, MI350, RDNA 2, 3 and 4.
const CODE_OBJECTS: &[(&str, &[Image])] = code_objects! {
    "gfx90a" "gfx942" "gfx950" "gfx1030" "gfx1100" "gfx1201";
    ["cast", "dequantize_any", "dequantize_rows", "dequantize_tiles", "scatter", "strided"]
};

/// Returns a module for an architecture. Code objects without a feature in their name run whatever the device's features.
pub(crate) fn find(architecture: &str, module: &str) -> Option<&'static [u8]> {
    let (_, images) = CODE_OBJECTS.iter().find(|(known, _)| *known == architecture)?;
    images.iter().find(|(name, _)| *name == module).map(|(_, image)| *image)
}

/// Returns what there are code objects for.
pub(crate) fn architectures() -> String {
    CODE_OBJECTS.iter().map(|(architecture, _)| *architecture).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_code_object_that_is_checked_in_is_here() {
        let compiled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels/compiled");
        let files = |folder: &str| {
            let entries = fs::read_dir(compiled.join(folder)).expect("a folder of code objects");
            let stem = |path: std::path::PathBuf| Some(path.file_stem()?.to_str()?.to_owned());
            entries.filter_map(|entry| stem(entry.ok()?.path())).collect::<BTreeSet<_>>()
        };
        let folders = fs::read_dir(&compiled).expect("the compiled kernels");
        let folders = folders.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let folders: BTreeSet<_> = folders.filter(|folder| folder.starts_with("gfx")).collect();
        let known: BTreeSet<_> =
            CODE_OBJECTS.iter().map(|(architecture, _)| (*architecture).to_owned()).collect();
        assert_eq!(known, folders);
        for (architecture, images) in CODE_OBJECTS {
            let names: BTreeSet<_> = images.iter().map(|(name, _)| (*name).to_owned()).collect();
            assert_eq!(names, files(architecture), "{architecture}");
        }
    }

    #[test]
    fn code_objects_are_elf_files_that_lie_aligned() {
        for (architecture, images) in CODE_OBJECTS {
            for (module, image) in *images {
                assert!(image.starts_with(b"\x7fELF"), "{architecture}/{module}");
                assert!(image.as_ptr().addr().is_multiple_of(8), "{architecture}/{module}");
            }
        }
    }
}
