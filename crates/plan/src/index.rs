//! The index of a sharded checkpoint: which tensor lies in which file.
//!
//! `model.safetensors.index.json` holds `{"metadata": {"total_size": BYTES}, "weight_map": {TENSOR: FILE}}`.
//! It is read leniently where other readers are (unknown keys, a missing or odd `metadata`) and strictly
//! where a mistake would load the wrong bytes: a tensor listed twice, a file name that leaves the
//! folder, a map that disagrees with the files' own headers.
//!
//! # Source
//! `transformers`, `modeling_utils.py` (`save_pretrained`), which writes it, and `huggingface_hub`,
//! `serialization/_torch.py`.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};

use hashbrown::{HashTable, hash_table};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};

use crate::header::Header;
use crate::header::json::{self, Any, Quoted};

/// The longest index accepted, in bytes: two million tensors with names of a hundred bytes.
pub const INDEX_LEN_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// A parsed index: the files of a checkpoint and the tensors each should hold.
///
/// Tensor names lie in one allocation; a tensor costs 12 bytes beside its name.
#[derive(Clone)]
pub struct Index {
    files: Vec<String>,
    names: String,
    entries: Vec<Entry>,
    /// Indices into `entries` by name. SipHash with random keys: names come from strangers.
    by_name: HashTable<u32>,
    hasher: RandomState,
    total_size: Option<u64>,
}

impl Index {
    /// Parses the bytes of an index file.
    ///
    /// # Errors
    /// [`IndexError::TooLong`] beyond [`INDEX_LEN_BYTES_MAX`]; [`IndexError::NotUtf8`] and
    /// [`IndexError::Json`] for what isn't an index, one without a `weight_map` or with two included;
    /// [`IndexError::DuplicateTensor`]; [`IndexError::FileName`] as [`check_file_name`] returns it.
    ///
    /// # Example
    /// ```
    /// use tensorhaul_plan::index::Index;
    ///
    /// let index = Index::parse(br#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}"#)?;
    /// assert_eq!(index.files(), ["1.safetensors", "2.safetensors"]);
    /// assert_eq!(index.entries().collect::<Vec<_>>(), [("a", 1), ("b", 0)]);
    /// # Ok::<(), tensorhaul_plan::index::IndexError>(())
    /// ```
    pub fn parse(json: &[u8]) -> Result<Index, IndexError> {
        let len_bytes = json.len() as u64;
        if len_bytes > INDEX_LEN_BYTES_MAX {
            return Err(IndexError::TooLong { len_bytes });
        }
        let text = std::str::from_utf8(json)
            .map_err(|error| IndexError::NotUtf8 { at_bytes: error.valid_up_to() as u64 })?;
        let mut index = Index::empty();
        let mut failure = None;
        let mut json = serde_json::Deserializer::from_str(text);
        json.deserialize_map(IndexVisitor { index: &mut index, failure: &mut failure })
            .and_then(|()| json.end())
            .map_err(|error| {
                failure.take().unwrap_or_else(|| IndexError::Json {
                    at_bytes: json::error_at(text, &error),
                    message: json::error_text(&error),
                })
            })?;
        index.sort_files();
        Ok(index)
    }

    /// Returns the file names, sorted, each once. Each passed [`check_file_name`].
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// Returns each tensor and the index of its file in [`Index::files`], in the order of the weight map.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (&str, usize)> {
        self.entries.iter().map(|entry| (self.name(entry), entry.file_index as usize))
    }

    /// Returns the index in [`Index::files`] of the file that should hold this tensor.
    pub fn file_index(&self, tensor: &str) -> Option<usize> {
        Some(self.entries[self.find(tensor)?].file_index as usize)
    }

    /// Returns `metadata.total_size`, the writer's count of the tensors' bytes: information, never a promise.
    /// Files with shared or later quantized tensors get it wrong, so nothing is checked against it. Some
    /// writers store it as a float; one that isn't a whole number of bytes counts as absent.
    pub fn total_size(&self) -> Option<u64> {
        self.total_size
    }

    /// Checks the weight map against the files' own headers, given in the order of [`Index::files`].
    ///
    /// Each listed tensor must be in the file it is listed for, and no tensor, listed or not, in two files. A
    /// tensor that a file holds and the map doesn't list is no error: it belongs to the checkpoint, as in
    /// `transformers` and vLLM, which load listed files whole. Refusing it would refuse checkpoints that
    /// others load, dropping it would lose weights without a word.
    ///
    /// # Errors
    /// [`IndexError::TwoFiles`], [`IndexError::WrongFile`] or [`IndexError::MissingTensor`], the first in the
    /// order of the files and their data, then of the weight map.
    ///
    /// # Panics
    /// When there isn't one header per file.
    pub fn check_against(&self, headers: &[Header]) -> Result<(), IndexError> {
        assert_eq!(headers.len(), self.files.len(), "one header per file of the index");
        let file = |file_index: usize| self.files[file_index].clone();
        let mut found = vec![false; self.entries.len()];
        let mut unlisted: HashMap<&str, usize> = HashMap::new();
        for (file_index, header) in headers.iter().enumerate() {
            for info in header.tensors() {
                let tensor = || info.name.to_owned();
                let Some(entry_index) = self.find(info.name) else {
                    if let Some(other) = unlisted.insert(info.name, file_index) {
                        let files = [file(other), file(file_index)];
                        return Err(IndexError::TwoFiles { tensor: tensor(), files });
                    }
                    continue;
                };
                let listed_index = self.entries[entry_index].file_index as usize;
                if listed_index == file_index {
                    found[entry_index] = true;
                } else if headers[listed_index].find(info.name).is_some() {
                    let (first, second) = (listed_index.min(file_index), listed_index.max(file_index));
                    return Err(IndexError::TwoFiles {
                        tensor: tensor(),
                        files: [file(first), file(second)],
                    });
                } else {
                    let (file, found_in) = (file(listed_index), file(file_index));
                    return Err(IndexError::WrongFile { tensor: tensor(), file, found_in });
                }
            }
        }
        match found.iter().position(|found| !found) {
            None => Ok(()),
            Some(missing) => {
                let entry = &self.entries[missing];
                let (tensor, file) = (self.name(entry).to_owned(), file(entry.file_index as usize));
                Err(IndexError::MissingTensor { tensor, file })
            }
        }
    }

    fn empty() -> Index {
        Index {
            files: Vec::new(),
            names: String::new(),
            entries: Vec::new(),
            by_name: HashTable::new(),
            hasher: RandomState::new(),
            total_size: None,
        }
    }

    fn name(&self, entry: &Entry) -> &str {
        &self.names[entry.name_start as usize..][..entry.name_len_bytes as usize]
    }

    fn find(&self, tensor: &str) -> Option<usize> {
        let hash = self.hasher.hash_one(tensor);
        let index = self.by_name.find(hash, |&index| self.name(&self.entries[index as usize]) == tensor)?;
        Some(*index as usize)
    }

    /// Adds a name to the arena; the entry gets its file later. Returns whether the name is new.
    fn push_name(&mut self, tensor: &str) -> bool {
        let Index { names, entries, by_name, hasher, .. } = self;
        let name_of = |index: u32| {
            let entry: &Entry = &entries[index as usize];
            &names[entry.name_start as usize..][..entry.name_len_bytes as usize]
        };
        let slot = by_name.entry(
            hasher.hash_one(tensor),
            |&other| name_of(other) == tensor,
            |&other| hasher.hash_one(name_of(other)),
        );
        let hash_table::Entry::Vacant(slot) = slot else {
            return false;
        };
        slot.insert(entries.len() as u32);
        let (name_start, name_len_bytes) = (names.len() as u32, tensor.len() as u32);
        names.push_str(tensor);
        entries.push(Entry { name_start, name_len_bytes, file_index: u32::MAX });
        true
    }

    /// Completes the entry that [`Index::push_name`] started, and returns its name.
    fn set_last_file(&mut self, file_index: u32) -> &str {
        let last = self.entries.last_mut().expect("a weight map's value follows its key");
        last.file_index = file_index;
        let last = *last;
        self.name(&last)
    }

    /// Sorts the files, which the entries name in the order of their first mention.
    fn sort_files(&mut self) {
        let mut order: Vec<usize> = (0..self.files.len()).collect();
        order.sort_unstable_by(|&a, &b| self.files[a].cmp(&self.files[b]));
        let mut place_of = vec![0; order.len()];
        for (place, &mention) in order.iter().enumerate() {
            place_of[mention] = place as u32;
        }
        self.files.sort_unstable();
        for entry in &mut self.entries {
            entry.file_index = place_of[entry.file_index as usize];
        }
    }
}

impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Index")
            .field("tensors", &self.entries.len())
            .field("files", &self.files)
            .field("total_size", &self.total_size)
            .finish_non_exhaustive()
    }
}

/// Checks that a file name of a weight map stays in the index's folder on every platform.
///
/// # Errors
/// [`IndexError::FileName`] for a name that is empty, `.` or `..`, or holds `/`, `\`, NUL or `:` (a drive or a
/// stream on Windows). Whether the file is a symlink that leaves the folder is for whoever opens it.
pub fn check_file_name(name: &str) -> Result<(), IndexError> {
    file_name_problem(name).map_err(|problem| IndexError::FileName {
        tensor: None,
        file: name.to_owned(),
        problem,
    })
}

fn file_name_problem(name: &str) -> Result<(), &'static str> {
    match name {
        "" => Err("is empty"),
        "." | ".." => Err("is a folder"),
        _ if name.contains(['/', '\\']) => Err("holds a path separator"),
        _ if name.contains('\0') => Err("holds a NUL"),
        _ if name.contains(':') => Err("holds a colon, which names a drive or a stream"),
        _ => Ok(()),
    }
}

/// What is wrong with an index, without the name of its file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IndexError {
    /// The index is longer than [`INDEX_LEN_BYTES_MAX`].
    TooLong {
        /// Its length.
        len_bytes: u64,
    },
    /// The index isn't UTF-8.
    NotUtf8 {
        /// The first byte that is no UTF-8.
        at_bytes: u64,
    },
    /// The index has a syntax error, or something else stands where the format wants a value.
    Json {
        /// Where the parser stopped: the first or last byte of what is wrong, or the byte before it.
        at_bytes: u64,
        /// What was found and what was expected.
        message: String,
    },
    /// The weight map lists a tensor twice.
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// A file name could leave the index's folder, or names no file.
    FileName {
        /// The first tensor listed for it.
        tensor: Option<String>,
        /// The name.
        file: String,
        /// What is wrong with it, as a predicate.
        problem: &'static str,
    },
    /// Two files hold a tensor of the same name.
    TwoFiles {
        /// The tensor.
        tensor: String,
        /// The files, sorted.
        files: [String; 2],
    },
    /// The tensor is in another file than listed.
    WrongFile {
        /// The tensor.
        tensor: String,
        /// The file it is listed for.
        file: String,
        /// The file it is in.
        found_in: String,
    },
    /// The tensor is in none of the files.
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The file it is listed for.
        file: String,
    },
}

impl IndexError {
    /// Returns the name of the tensor at fault.
    pub fn tensor(&self) -> Option<&str> {
        match self {
            Self::FileName { tensor, .. } => tensor.as_deref(),
            Self::DuplicateTensor { tensor }
            | Self::TwoFiles { tensor, .. }
            | Self::WrongFile { tensor, .. }
            | Self::MissingTensor { tensor, .. } => Some(tensor),
            Self::TooLong { .. } | Self::NotUtf8 { .. } | Self::Json { .. } => None,
        }
    }

    /// Returns the name of the file that the weight map lists, the first of two.
    pub fn file(&self) -> Option<&str> {
        match self {
            Self::FileName { file, .. }
            | Self::TwoFiles { files: [file, _], .. }
            | Self::WrongFile { file, .. }
            | Self::MissingTensor { file, .. } => Some(file),
            Self::TooLong { .. }
            | Self::NotUtf8 { .. }
            | Self::Json { .. }
            | Self::DuplicateTensor { .. } => None,
        }
    }

    /// Returns the bytes of the index file that are at fault, start and end.
    pub fn bytes(&self) -> Option<(u64, u64)> {
        match *self {
            Self::NotUtf8 { at_bytes } | Self::Json { at_bytes, .. } => Some((at_bytes, at_bytes + 1)),
            _ => None,
        }
    }
}

impl fmt::Display for IndexError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(tensor) = self.tensor() {
            write!(f, "tensor {}: ", Quoted(tensor))?;
        }
        match self {
            Self::TooLong { len_bytes } => {
                write!(f, "the index has {len_bytes} bytes, the maximum is {INDEX_LEN_BYTES_MAX}")
            }
            Self::NotUtf8 { at_bytes } => write!(f, "the index isn't UTF-8 at byte {at_bytes}"),
            Self::Json { at_bytes, message } => write!(f, "{message}, at byte {at_bytes} of the index"),
            Self::DuplicateTensor { .. } => f.write_str("the weight map lists it twice"),
            Self::FileName { file, problem, .. } => {
                write!(f, "the file name {} {problem}; the files must lie beside the index", Quoted(file))
            }
            Self::TwoFiles { files: [first, second], .. } => {
                write!(f, "it is in both {} and {}", Quoted(first), Quoted(second))
            }
            Self::WrongFile { file, found_in, .. } => {
                write!(f, "listed for {}, but it is in {}", Quoted(file), Quoted(found_in))
            }
            Self::MissingTensor { file, .. } => {
                write!(f, "listed for {}, but no file has it", Quoted(file))
            }
        }
    }
}

impl std::error::Error for IndexError {}

/// A tensor of the weight map. Its name lies in an arena shorter than `u32::MAX`, because each byte of it
/// takes at least one byte of JSON.
#[derive(Clone, Copy)]
struct Entry {
    name_start: u32,
    name_len_bytes: u32,
    file_index: u32,
}

const _: () = assert!(INDEX_LEN_BYTES_MAX < u32::MAX as u64);

/// The whole index.
struct IndexVisitor<'a> {
    index: &'a mut Index,
    failure: &'a mut Option<IndexError>,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Metadata,
    WeightMap,
    #[serde(other)]
    Unknown,
}

impl<'de> Visitor<'de> for IndexVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an index with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut seen_metadata, mut seen_weight_map) = (false, false);
        while let Some(field) = map.next_key()? {
            match field {
                Field::Metadata if seen_metadata => return Err(A::Error::duplicate_field("metadata")),
                Field::WeightMap if seen_weight_map => return Err(A::Error::duplicate_field("weight_map")),
                Field::Metadata => {
                    seen_metadata = true;
                    self.index.total_size = map.next_value::<Metadata>()?.total_size;
                }
                Field::WeightMap => {
                    seen_weight_map = true;
                    let (index, failure) = (&mut *self.index, &mut *self.failure);
                    map.next_value_seed(WeightMap { index, failure, file_indices: HashMap::new() })?;
                }
                Field::Unknown => {
                    map.next_value::<Any>()?;
                }
            }
        }
        if seen_weight_map { Ok(()) } else { Err(A::Error::missing_field("weight_map")) }
    }
}

/// The weight map, read into the index's arenas.
struct WeightMap<'a> {
    index: &'a mut Index,
    failure: &'a mut Option<IndexError>,
    /// Places in `index.files`, which are in the order of mention until all have been read.
    file_indices: HashMap<String, u32>,
}

impl WeightMap<'_> {
    fn fail<E: serde::de::Error>(&mut self, error: IndexError) -> E {
        *self.failure = Some(error);
        E::custom("the weight map is at fault")
    }
}

impl<'de> DeserializeSeed<'de> for WeightMap<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor to file name")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(()) = map.next_key_seed(TensorSeed(&mut self))? {
            map.next_value_seed(FileSeed(&mut self))?;
        }
        Ok(())
    }
}

/// A key of the weight map: starts an entry.
struct TensorSeed<'a, 'b>(&'a mut WeightMap<'b>);

impl<'de> DeserializeSeed<'de> for TensorSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for TensorSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor's name")
    }

    fn visit_str<E: serde::de::Error>(self, tensor: &str) -> Result<(), E> {
        if self.0.index.push_name(tensor) {
            Ok(())
        } else {
            Err(self.0.fail(IndexError::DuplicateTensor { tensor: tensor.to_owned() }))
        }
    }
}

/// A value of the weight map: completes the entry that its key started.
struct FileSeed<'a, 'b>(&'a mut WeightMap<'b>);

impl<'de> DeserializeSeed<'de> for FileSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for FileSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a file name")
    }

    fn visit_str<E: serde::de::Error>(self, file: &str) -> Result<(), E> {
        let map = self.0;
        let known = map.file_indices.get(file).copied();
        let file_index = known.unwrap_or(map.index.files.len() as u32);
        let tensor = map.index.set_last_file(file_index);
        if known.is_none() {
            if let Err(problem) = file_name_problem(file) {
                let (tensor, file) = (Some(tensor.to_owned()), file.to_owned());
                return Err(map.fail(IndexError::FileName { tensor, file, problem }));
            }
            map.file_indices.insert(file.to_owned(), file_index);
            map.index.files.push(file.to_owned());
        }
        Ok(())
    }
}

/// The `metadata` of an index, of which only the total size is kept.
struct Metadata {
    total_size: Option<u64>,
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Metadata, D::Error> {
        deserializer.deserialize_any(Metadata { total_size: None })
    }
}

impl<'de> Visitor<'de> for Metadata {
    type Value = Metadata;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of metadata")
    }

    fn visit_unit<E>(self) -> Result<Metadata, E> {
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Metadata, A::Error> {
        #[derive(Deserialize)]
        #[serde(field_identifier, rename_all = "snake_case")]
        enum Field {
            TotalSize,
            #[serde(other)]
            Unknown,
        }
        while let Some((field, Any { whole })) = map.next_entry()? {
            match field {
                Field::TotalSize => self.total_size = whole,
                Field::Unknown => {}
            }
        }
        Ok(self)
    }
}
