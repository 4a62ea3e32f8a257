//! From what the user names to the files of a checkpoint: a file, a folder, an index, a cached model.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use tensorhaul_io::OpenFile;
use tensorhaul_plan::Index;
use tensorhaul_plan::index::{INDEX_LEN_BYTES_MAX, check_file_name};

use crate::error::{Error, ErrorKind, Result};

/// The files of a checkpoint.
#[derive(Debug)]
pub(crate) struct Located {
    /// Paths, in the order of the index, or of their names.
    pub(crate) files: Vec<PathBuf>,
    /// The index and its path, where the checkpoint has one.
    pub(crate) index: Option<(PathBuf, Index)>,
    /// Where config.json and its like are.
    pub(crate) folder: PathBuf,
}

/// Finds the files of what `path` names.
///
/// # Errors
/// Not found; an index that is malformed, or names files outside its folder or missing ones.
pub(crate) fn locate(path: &Path) -> Result<Located> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => in_folder(path),
        Ok(_) if path.extension().is_some_and(|extension| extension == "json") => by_index(path),
        Ok(_) => Ok(Located { files: vec![path.to_owned()], index: None, folder: folder_of(path) }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => match cached_model(path)? {
            Some(snapshot) => in_folder(&snapshot),
            None => Err(Error::io("opening it", path, error)),
        },
        Err(error) => Err(Error::io("opening it", path, error)),
    }
}

/// A folder holds an index, or files of its own.
fn in_folder(folder: &Path) -> Result<Located> {
    let listing = |error| Error::io("listing it", folder, error);
    let (mut indexes, mut files) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(listing)? {
        let path = entry.map_err(listing)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".safetensors.index.json") {
            indexes.push(path);
        } else if name.ends_with(".safetensors") && !name.starts_with('.') {
            files.push(path);
        }
    }
    indexes.sort();
    files.sort();
    let preferred = indexes.iter().position(|path| path.ends_with(INDEX_NAME));
    match (indexes.as_slice(), preferred) {
        ([], _) if files.is_empty() => {
            let what = "no .safetensors file and no .safetensors.index.json is here";
            Err(Error::new(ErrorKind::NotFound, what).in_file(folder))
        }
        ([], _) => {
            check_complete(&files, folder)?;
            for file in &files {
                check_inside(file, folder)?;
            }
            Ok(Located { files, index: None, folder: folder.to_owned() })
        }
        (_, Some(preferred)) => by_index(&indexes[preferred]),
        ([only], None) => by_index(only),
        (several, None) => {
            let names: Vec<_> = several.iter().map(|path| path.display().to_string()).collect();
            Err(Error::bad_request(format!(
                "the folder has several indexes; name one of {}",
                names.join(", ")
            ))
            .in_file(folder))
        }
    }
}

/// Files named `…-00002-of-00005.safetensors` are a checkpoint only together. With an index that is its affair.
fn check_complete(files: &[PathBuf], folder: &Path) -> Result<()> {
    let mut counts: BTreeMap<(String, u32), u32> = BTreeMap::new();
    for file in files {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let parts = stem.rsplit_once("-of-").and_then(|(front, of)| Some((front.rsplit_once('-')?, of)));
        if let Some(((prefix, number), of)) = parts
            && let (Ok(_), Ok(of)) = (number.parse::<u32>(), of.parse::<u32>())
        {
            *counts.entry((prefix.to_owned(), of)).or_default() += 1;
        }
    }
    match counts.into_iter().find(|((_, of), count)| count != of) {
        Some(((prefix, of), count)) => {
            let what =
                format!("holds {count} of the {of} files of {prefix:?}, and no index; download the rest");
            Err(Error::new(ErrorKind::Malformed, what).in_file(folder))
        }
        None => Ok(()),
    }
}

/// An index names plain files beside it.
fn by_index(path: &Path) -> Result<Located> {
    let folder = folder_of(path);
    let index =
        Index::parse(&read_limited(path, INDEX_LEN_BYTES_MAX)?).map_err(|error| Error::index(error, path))?;
    if index.files().is_empty() {
        return Err(Error::new(ErrorKind::Malformed, "lists no tensor").in_file(path));
    }
    let mut files = Vec::with_capacity(index.files().len());
    for name in index.files() {
        check_file_name(name).map_err(|error| Error::index(error, path))?;
        let file = folder.join(name);
        if !file.exists() {
            let what = format!("names {name:?}, which is not in its folder");
            return Err(Error::new(ErrorKind::NotFound, what).in_file(path));
        }
        check_inside(&file, &folder)?;
        files.push(file);
    }
    Ok(Located { files, index: Some((path.to_owned(), index)), folder })
}

/// A file of a checkpoint may be a symbolic link only inside its folder, or, as the Hugging Face cache
/// has it, from `models--org--name/snapshots/<rev>` into the `blobs` of the same model.
pub(crate) fn check_inside(file: &Path, folder: &Path) -> Result<()> {
    let real = |path: &Path| fs::canonicalize(path).map_err(|error| Error::io("resolving it", path, error));
    let (real_file, real_folder) = (real(file)?, real(folder)?);
    let model =
        real_folder.parent().filter(|snapshots| snapshots.ends_with("snapshots")).and_then(Path::parent);
    let blobs = model.map(|model| model.join("blobs"));
    if real_file.starts_with(&real_folder) || blobs.is_some_and(|blobs| real_file.starts_with(blobs)) {
        return Ok(());
    }
    let what = format!("is a symbolic link that leaves its folder, to {}", real_file.display());
    Err(Error::new(ErrorKind::Malformed, what).in_file(file))
}

/// Finds `org/name`, or a `name` of old without one, in the local Hugging Face cache; nothing is ever downloaded.
///
/// # Source
/// huggingface_hub, "Understand caching": `models--{org}--{name}/refs/main` holds the revision whose
/// files are in `snapshots/{revision}`.
fn cached_model(id: &Path) -> Result<Option<PathBuf>> {
    let parts: Option<Vec<&str>> = id
        .components()
        .map(|part| match part {
            Component::Normal(part) => part.to_str(),
            _ => None,
        })
        .collect();
    let folder = match parts.as_deref() {
        Some([org, name]) => format!("models--{org}--{name}"),
        Some([name]) => format!("models--{name}"),
        _ => return Ok(None),
    };
    let Some(cache) = cache_folder() else {
        return Ok(None);
    };
    let model = cache.join(folder);
    if !model.is_dir() {
        return Ok(None);
    }
    let refs = model.join("refs/main");
    let revision = read_limited(&refs, REVISION_LEN_BYTES_MAX)?;
    let revision = String::from_utf8_lossy(&revision).trim().to_owned();
    check_file_name(&revision).map_err(|error| Error::index(error, &refs))?;
    let snapshot = model.join("snapshots").join(revision);
    if snapshot.is_dir() {
        return Ok(Some(snapshot));
    }
    Err(Error::new(ErrorKind::NotFound, "the cached revision has no snapshot; download the model again")
        .in_file(snapshot))
}

/// Returns where the Hugging Face cache is, by the variables its own tools obey.
pub(crate) fn cache_folder() -> Option<PathBuf> {
    let path = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    path("HF_HUB_CACHE")
        .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| path("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

/// Reads a whole small file, and not more than `len_bytes_max` of it.
pub(crate) fn read_limited(path: &Path, len_bytes_max: u64) -> Result<Vec<u8>> {
    let file = OpenFile::open(path)?;
    let mut bytes = Vec::new();
    let read = file.cached().take(len_bytes_max + 1).read_to_end(&mut bytes);
    read.map_err(|error| Error::io("reading it", path, error))?;
    if bytes.len() as u64 > len_bytes_max {
        let what = format!("has {} bytes, more than the {len_bytes_max} it may have", file.len_bytes());
        return Err(Error::new(ErrorKind::Malformed, what).in_file(path));
    }
    Ok(bytes)
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

const INDEX_NAME: &str = "model.safetensors.index.json";

/// A commit hash, or a branch's name.
const REVISION_LEN_BYTES_MAX: u64 = 1024;
