//! Many files as one tensor table.

use std::fmt;
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;
use serde::Serialize;

use crate::header::{Header, TensorInfo};

/// One file of a checkpoint: its name and its header.
#[derive(Debug)]
pub struct File {
    name: String,
    header: Header,
}

impl File {
    /// Joins a parsed header with the name that errors and reports use for the file.
    pub fn new(name: impl Into<String>, header: Header) -> File {
        File { name: name.into(), header }
    }

    /// Returns the name that errors and reports use.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the length of the whole file, which the header describes without holes.
    pub fn len_bytes(&self) -> u64 {
        self.header.data_start_bytes() + self.header.data_len_bytes()
    }
}

/// A tensor's place in the table of its checkpoint: files in order, offsets in order within each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct TensorId(pub u32);

/// A tensor as the checkpoint stores it.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'c> {
    /// Its place in the table.
    pub id: TensorId,
    /// Which file, by its place in [`Checkpoint::files`].
    pub file: u32,
    /// Name, dtype, shape and offsets from the header.
    pub info: TensorInfo<'c>,
    /// Distance from the start of the *file* to the tensor's first byte.
    pub file_offset_bytes: u64,
}

/// The union of the files of a checkpoint: one table of tensors, each name once.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<File>,
    first_ids: Vec<u32>,
    tensor_count: u32,
    by_name: HashTable<u32>,
    hasher: RandomState,
}

impl Checkpoint {
    /// Joins files, in the order given, into one table.
    ///
    /// # Errors
    /// [`CheckpointError::TensorInTwoFiles`] when two files hold a tensor of the same name;
    /// [`CheckpointError::TooManyTensors`] past [`TENSOR_COUNT_MAX`].
    pub fn new(files: Vec<File>) -> Result<Checkpoint, CheckpointError> {
        let total: usize = files.iter().map(|file| file.header.len()).sum();
        if total > TENSOR_COUNT_MAX as usize {
            return Err(CheckpointError::TooManyTensors { found: total, max: TENSOR_COUNT_MAX });
        }
        let mut first_ids = Vec::with_capacity(files.len());
        let mut tensor_count = 0u32;
        for file in &files {
            first_ids.push(tensor_count);
            tensor_count += file.header.len() as u32; // The sum was checked above.
        }
        let mut checkpoint = Checkpoint {
            files,
            first_ids,
            tensor_count,
            by_name: HashTable::new(),
            hasher: RandomState::new(),
        };
        checkpoint.index_names()?;
        Ok(checkpoint)
    }

    /// Returns the files in table order.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// Returns the number of tensors in all files.
    pub fn len(&self) -> usize {
        self.tensor_count as usize
    }

    /// Tells whether no file holds a tensor.
    pub fn is_empty(&self) -> bool {
        self.tensor_count == 0
    }

    /// Returns the tensor with this place in the table.
    ///
    /// # Panics
    /// When the id comes from a checkpoint with more tensors.
    pub fn tensor(&self, id: TensorId) -> TensorRef<'_> {
        let file = self.first_ids.partition_point(|first| *first <= id.0) - 1;
        self.tensor_in(file, id.0)
    }

    /// Returns the tensor of this name.
    pub fn find(&self, name: &str) -> Option<TensorRef<'_>> {
        if let [file] = self.files.as_slice() {
            return file.header.find(name).map(|index| self.tensor_in(0, index as u32));
        }
        let hash = self.hasher.hash_one(name);
        let id = self.by_name.find(hash, |id| self.tensor(TensorId(*id)).info.name == name)?;
        Some(self.tensor(TensorId(*id)))
    }

    /// Walks the table in order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorRef<'_>> {
        self.files.iter().enumerate().flat_map(move |(file, entry)| {
            let first = self.first_ids[file];
            (0..entry.header.len() as u32).map(move |index| self.tensor_in(file, first + index))
        })
    }

    fn tensor_in(&self, file: usize, id: u32) -> TensorRef<'_> {
        let header = &self.files[file].header;
        let info = header.tensor((id - self.first_ids[file]) as usize);
        let file_offset_bytes = header.data_start_bytes() + info.data_offsets.0;
        TensorRef { id: TensorId(id), file: file as u32, info, file_offset_bytes }
    }

    /// Fills the table of names, unless one file's own table already answers.
    fn index_names(&mut self) -> Result<(), CheckpointError> {
        if self.files.len() < 2 {
            return Ok(());
        }
        let mut by_name = HashTable::with_capacity(self.tensor_count as usize);
        for tensor in self.tensors() {
            let name = tensor.info.name;
            let hash = self.hasher.hash_one(name);
            if let Some(other) = by_name.find(hash, |id| self.tensor(TensorId(*id)).info.name == name) {
                let other = self.tensor(TensorId(*other));
                return Err(CheckpointError::TensorInTwoFiles {
                    tensor: name.to_owned(),
                    first: self.files[other.file as usize].name.clone(),
                    second: self.files[tensor.file as usize].name.clone(),
                });
            }
            by_name.insert_unique(hash, tensor.id.0, |id| {
                self.hasher.hash_one(self.tensor(TensorId(*id)).info.name)
            });
        }
        self.by_name = by_name;
        Ok(())
    }
}

/// What keeps files from being one checkpoint.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Two files hold a tensor of the same name.
    TensorInTwoFiles {
        /// The name.
        tensor: String,
        /// The file that comes first.
        first: String,
        /// The file that repeats the name.
        second: String,
    },
    /// More tensors than a plan can number.
    TooManyTensors {
        /// Tensors in all files.
        found: usize,
        /// The limit.
        max: u32,
    },
}

impl CheckpointError {
    /// Returns the tensor at fault, if it is one.
    pub fn tensor(&self) -> Option<&str> {
        match self {
            CheckpointError::TensorInTwoFiles { tensor, .. } => Some(tensor),
            CheckpointError::TooManyTensors { .. } => None,
        }
    }
}

impl fmt::Display for CheckpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CheckpointError::TensorInTwoFiles { tensor, first, second } => {
                write!(f, "tensor {tensor:?} is in two files, {first} and {second}")
            }
            CheckpointError::TooManyTensors { found, max } => {
                write!(f, "the files hold {found} tensors together, at most {max} can be planned")
            }
        }
    }
}

impl std::error::Error for CheckpointError {}

/// The most tensors of one checkpoint. A header of [`HEADER_LEN_BYTES_MAX`](crate::header::HEADER_LEN_BYTES_MAX)
/// holds about 2 million at 50 bytes each, so 16 million is eight such files; a plan of it takes about 2 GB.
pub const TENSOR_COUNT_MAX: u32 = 1 << 24;
