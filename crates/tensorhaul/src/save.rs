//! Writes checkpoints: tensors from any source of bytes into files that appear whole or not at all.

mod out_folder;
mod shard;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;
use tensorhaul_plan::{Dtype, numel};

pub(crate) use self::out_folder::OutFolder;
use self::shard::{Watch, arrange, write_shard};
use crate::atomic::{Existing, NewFile, publish};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::tensor::Tensor;

/// A tensor to be written.
pub struct SaveTensor<'a> {
    /// The name; any string but `__metadata__`.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The dims in elements, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// Where its bytes come from: little-endian, row-major, without gaps.
    pub bytes: Box<dyn TensorBytes + 'a>,
}

/// Where the bytes of a tensor come from: host memory, a device, a computation.
///
/// The writer asks for them in pieces, once each and in order, so that a tensor is never held twice.
pub trait TensorBytes {
    /// Returns how many bytes there are. The writer checks it against dtype and shape before it writes.
    fn len_bytes(&self) -> u64;

    /// Hears that its turn will come: called once for each tensor, in the order in which they will be filled, before the first is.
    /// A source that computes its bytes learns from it what to compute together. Does nothing by default.
    fn announce(&self) {}

    /// Fills all of `target` with the bytes from `offset_bytes` on. Pieces begin and end between elements
    /// (of element types that are at least a byte wide).
    ///
    /// # Errors
    /// Whatever keeps the bytes from coming; the writer then leaves no file behind.
    fn fill(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<()>;
}

impl TensorBytes for &[u8] {
    fn len_bytes(&self) -> u64 {
        self.len() as u64
    }

    fn fill(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<()> {
        target.copy_from_slice(&self[offset_bytes as usize..][..target.len()]);
        Ok(())
    }
}

impl TensorBytes for Tensor {
    fn len_bytes(&self) -> u64 {
        Tensor::len_bytes(self)
    }

    fn fill(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<()> {
        self.bytes()?.fill(offset_bytes, target)
    }
}

/// How to write a checkpoint.
#[derive(Clone, Default)]
pub struct SaveOptions {
    pub(crate) max_shard_bytes: Option<u64>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) progress: Option<Arc<dyn Fn(Progress) + Send + Sync>>,
    pub(crate) cancel: Option<Arc<AtomicBool>>,
}

impl SaveOptions {
    /// The most bytes of tensors in one file; its header comes on top. A larger tensor gets a file of its
    /// own. Default: no limit, one file. Costs no memory.
    pub fn max_shard_bytes(self, max_shard_bytes: u64) -> Self {
        SaveOptions { max_shard_bytes: Some(max_shard_bytes), ..self }
    }

    /// The strings of `__metadata__`, the same in every file. Default: none.
    pub fn metadata(self, metadata: BTreeMap<String, String>) -> Self {
        SaveOptions { metadata, ..self }
    }

    /// Called from the writing thread after every write, with totals so far.
    pub fn on_progress(self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        SaveOptions { progress: Some(Arc::new(progress)), ..self }
    }

    /// Ends the writing with [`Cancelled`](crate::ErrorKind::Cancelled) soon after this becomes true, and leaves no file.
    pub fn cancel_on(self, cancel: Arc<AtomicBool>) -> Self {
        SaveOptions { cancel: Some(cancel), ..self }
    }
}

impl fmt::Debug for SaveOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SaveOptions")
            .field("max_shard_bytes", &self.max_shard_bytes)
            .field("metadata", &self.metadata)
            .finish_non_exhaustive()
    }
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Saved {
    /// The names of the files that hold tensors, in order.
    pub files: Vec<String>,
    /// The name of the index, where there is more than one file.
    pub index: Option<String>,
    /// Number of tensors.
    pub tensors: u64,
    /// Bytes of the tensors.
    pub bytes: u64,
}

/// Writes tensors into a folder, as `model.safetensors`, or as `model-00001-of-0000N.safetensors` and
/// `model.safetensors.index.json` where [`SaveOptions::max_shard_bytes`] makes several files of them.
///
/// Files are filled in the order of `tensors`, and hold them by descending width and then by name, as the
/// reference writer does. The data of each begins at a multiple of 4096 bytes, so that direct reads can
/// begin with the first tensor. Names are given when every byte is on storage, the index's last: a reader
/// finds all of the checkpoint or none of it.
///
/// # Errors
/// [`BadRequest`](crate::ErrorKind::BadRequest) when the folder holds a checkpoint already, when a name occurs twice, or when
/// a tensor has not the bytes that its dtype and shape need; [`Io`](crate::ErrorKind::Io); the sources' own errors.
/// Nothing is left behind.
///
/// # Example
/// ```
/// use tensorhaul::save::{SaveOptions, SaveTensor, save};
/// use tensorhaul::{Dtype, Model};
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path();
/// let ones: Vec<u8> = [1.0f32; 6].iter().flat_map(|one| one.to_le_bytes()).collect();
/// let tensor = SaveTensor {
///     name: "ones".to_owned(),
///     dtype: Dtype::F32,
///     shape: vec![2, 3],
///     bytes: Box::new(&ones[..]),
/// };
/// save(folder, vec![tensor], &SaveOptions::default())?;
/// assert_eq!(Model::open(folder)?.tensor("ones")?.as_slice::<f32>()?, [1.0; 6]);
/// # Ok::<(), tensorhaul::Error>(())
/// ```
///
/// # Source
/// Order within a file: the `safetensors` crate 0.8.0, `tensor.rs`, `prepare`. Names of files and index:
/// `huggingface_hub`, `serialization/_base.py`, `split_state_dict_into_shards_factory`.
pub fn save(folder: &Path, tensors: Vec<SaveTensor<'_>>, options: &SaveOptions) -> Result<Saved> {
    let folder = OutFolder::prepare(folder)?;
    let (files, saved) = write_checkpoint(&folder, tensors, options)?;
    folder.publish(files)?;
    Ok(saved)
}

/// Writes tensors into one file, over whatever has its name: readers see the old file or the new one.
///
/// # Errors
/// As [`save`], but for an existing file. [`SaveOptions::max_shard_bytes`] does not apply.
pub fn save_file(path: &Path, mut tensors: Vec<SaveTensor<'_>>, options: &SaveOptions) -> Result<Saved> {
    check(&tensors)?;
    let mut watch = Watch::new(&tensors, options);
    let (tensor_count, bytes) = (watch.totals.total_tensors, watch.totals.total_bytes);
    arrange(&mut tensors);
    let file = write_shard(path, &mut tensors, options, &mut watch)?;
    let saved = Saved { files: vec![file.name()], index: None, tensors: tensor_count, bytes };
    publish(vec![file], Existing::Replaced)?;
    Ok(saved)
}

/// Writes the files of a checkpoint, and the index as the last of them, without giving them their names.
pub(crate) fn write_checkpoint(
    folder: &OutFolder,
    mut tensors: Vec<SaveTensor<'_>>,
    options: &SaveOptions,
) -> Result<(Vec<NewFile>, Saved)> {
    check(&tensors)?;
    let max_shard_bytes = options.max_shard_bytes.unwrap_or(u64::MAX);
    if max_shard_bytes == 0 {
        return Err(Error::bad_request("a shard of 0 bytes holds no tensor; the least is 1"));
    }
    let lens: Vec<u64> = tensors.iter().map(|tensor| tensor.bytes.len_bytes()).collect();
    let shards = shards(&lens, max_shard_bytes);
    shards.iter().for_each(|range| arrange(&mut tensors[range.clone()]));
    let mut watch = Watch::new(&tensors, options);
    let mut index = Index {
        metadata: IndexMetadata { total_size: watch.totals.total_bytes },
        weight_map: BTreeMap::new(),
    };
    let mut files = Vec::with_capacity(shards.len() + 1);
    for (number, range) in shards.iter().enumerate() {
        let name = shard_name(number, shards.len());
        let shard = &mut tensors[range.clone()];
        files.push(write_shard(&folder.new_path(&name)?, shard, options, &mut watch)?);
        if shards.len() > 1 {
            index.weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        }
    }
    let names = files.iter().map(NewFile::name).collect();
    let (tensors, bytes) = (watch.totals.total_tensors, watch.totals.total_bytes);
    let mut saved = Saved { files: names, index: None, tensors, bytes };
    if shards.len() > 1 {
        let mut file = NewFile::create(&folder.new_path(INDEX_NAME)?)?;
        let mut json = serde_json::to_vec_pretty(&index).expect("strings and numbers always serialize");
        json.push(b'\n');
        file.write(&json)?;
        file.sync()?;
        saved.index = Some(file.name());
        files.push(file);
    }
    Ok((files, saved))
}

#[derive(Serialize)]
struct Index {
    metadata: IndexMetadata,
    weight_map: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct IndexMetadata {
    total_size: u64,
}

/// Checks that names are unique and that every source has the bytes its tensor needs.
fn check(tensors: &[SaveTensor<'_>]) -> Result<()> {
    let mut names = HashSet::with_capacity(tensors.len());
    for tensor in tensors {
        let SaveTensor { name, dtype, shape, bytes } = tensor;
        if !names.insert(name) {
            return Err(Error::bad_request("the name occurs twice").about_tensor(name));
        }
        let needed = numel(shape).and_then(|numel| dtype.len_bytes(numel));
        let found = bytes.len_bytes();
        // What has no length in bytes at all is left to the header, which says why.
        if let Some(needed) = needed.filter(|needed| *needed != found) {
            let what = format!("its source has {found} bytes, {dtype} {shape:?} needs {needed}");
            return Err(Error::bad_request(what).about_tensor(name));
        }
    }
    Ok(())
}

/// Cuts a list of lengths into runs of at most `max_bytes`, or of one that is longer. Nothing is one run.
fn shards(lens_bytes: &[u64], max_bytes: u64) -> Vec<Range<usize>> {
    let (mut shards, mut begin, mut len_bytes) = (Vec::new(), 0, 0u64);
    for (place, tensor_len_bytes) in lens_bytes.iter().enumerate() {
        len_bytes = len_bytes.saturating_add(*tensor_len_bytes);
        if len_bytes > max_bytes && place > begin {
            shards.push(begin..place);
            (begin, len_bytes) = (place, *tensor_len_bytes);
        }
    }
    shards.push(begin..lens_bytes.len());
    shards
}

fn shard_name(number: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    }
}

const INDEX_NAME: &str = "model.safetensors.index.json";

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::Ordering;

    use super::shard::{BUFFER_LEN_BYTES, DATA_ALIGN_BYTES};
    use super::*;
    use crate::error::ErrorKind;
    use crate::model::Model;

    /// Bytes that count up, in no memory.
    struct Counting {
        len_bytes: u64,
        fails_at: Option<u64>,
    }

    impl TensorBytes for Counting {
        fn len_bytes(&self) -> u64 {
            self.len_bytes
        }

        fn fill(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<()> {
            for (place, byte) in (offset_bytes..).zip(target) {
                if self.fails_at == Some(place) {
                    return Err(Error::new(ErrorKind::Device, "the device was lost"));
                }
                *byte = (place % 251) as u8;
            }
            Ok(())
        }
    }

    fn counting(name: &str, dtype: Dtype, numel: u64) -> SaveTensor<'static> {
        let len_bytes = dtype.len_bytes(numel).unwrap();
        let bytes = Box::new(Counting { len_bytes, fails_at: None });
        SaveTensor { name: name.to_owned(), dtype, shape: vec![numel], bytes }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_tensor_longer_than_the_buffer_comes_back_whole() {
        let folder = tempfile::tempdir().unwrap();
        let numel = (2 * BUFFER_LEN_BYTES + 4096) as u64 / 2 + 3;
        let tensors = vec![counting("odd", Dtype::U8, 7), counting("long", Dtype::Bf16, numel)];
        let saved = save(folder.path(), tensors, &SaveOptions::default()).unwrap();
        assert_eq!(saved.bytes, 2 * numel + 7);
        let model = Model::open(folder.path()).unwrap();
        for name in ["odd", "long"] {
            let tensor = model.tensor(name).unwrap();
            let bytes = tensor.bytes().unwrap();
            assert!(bytes.iter().enumerate().all(|(place, byte)| *byte == (place % 251) as u8), "{name}");
        }
        let file = &model.checkpoint().files()[0];
        assert_eq!(file.header().data_start_bytes() % DATA_ALIGN_BYTES, 0);
        let stored: Vec<_> = file.header().tensors().map(|tensor| tensor.name).collect();
        assert_eq!(stored, ["long", "odd"]);
    }

    #[test]
    fn no_element_is_split_between_two_pieces() {
        struct Whole(Counting);
        impl TensorBytes for Whole {
            fn len_bytes(&self) -> u64 {
                self.0.len_bytes
            }
            fn fill(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<()> {
                assert!(offset_bytes.is_multiple_of(8) && target.len().is_multiple_of(8));
                self.0.fill(offset_bytes, target)
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let numel = BUFFER_LEN_BYTES as u64 / 8 + 5;
        let whole = || Box::new(Whole(Counting { len_bytes: 8 * numel, fails_at: None }));
        let f64s = SaveTensor { name: "b".to_owned(), dtype: Dtype::F64, shape: vec![numel], bytes: whole() };
        let u64s = SaveTensor { name: "c".to_owned(), dtype: Dtype::U64, shape: vec![numel], bytes: whole() };
        let tensors = vec![counting("a", Dtype::F16, 13), f64s, counting("d", Dtype::Bool, 1), u64s];
        save(folder.path(), tensors, &SaveOptions::default()).unwrap();
    }

    #[test]
    fn shards_are_filled_in_order_and_a_long_tensor_has_its_own() {
        assert_eq!(shards(&[3, 3, 3, 9, 1], 6), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(shards(&[0, 0, 6, 0, 1], 6), [0..4, 4..5]);
        assert_eq!(shards(&[9], 6), std::slice::from_ref(&(0..1)));
        assert_eq!(shards(&[], 6), std::slice::from_ref(&(0..0)));
        assert_eq!(shards(&[u64::MAX, 1], 6), [0..1, 1..2]);

        let folder = tempfile::tempdir().unwrap();
        let tensors = ["x", "y", "z"].map(|name| counting(name, Dtype::F32, 10)).into();
        let saved = save(folder.path(), tensors, &SaveOptions::default().max_shard_bytes(80)).unwrap();
        assert_eq!(saved.files.len(), 2);
        assert_eq!(
            names(folder.path()),
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json"
            ]
        );
        let model = Model::open(folder.path()).unwrap();
        assert_eq!(model.checkpoint().len(), 3);
        let index = fs::read(folder.path().join(saved.index.unwrap())).unwrap();
        assert_eq!(tensorhaul_plan::Index::parse(&index).unwrap().total_size(), Some(120));
    }

    #[test]
    fn a_source_that_fails_leaves_no_file_and_no_folder() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("new/model");
        let bytes = Box::new(Counting { len_bytes: 8, fails_at: Some(5) });
        let failing = SaveTensor { name: "w".to_owned(), dtype: Dtype::U8, shape: vec![8], bytes };
        let tensors = vec![counting("first", Dtype::F32, 2), failing];
        let error = save(&folder, tensors, &SaveOptions::default().max_shard_bytes(8)).unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (ErrorKind::Device, Some("w")));
        assert!(names(outer.path()).is_empty());
    }

    #[test]
    fn a_cancelled_save_leaves_nothing() {
        let outer = tempfile::tempdir().unwrap();
        let cancel = Arc::new(AtomicBool::new(false));
        let cancels = Arc::clone(&cancel);
        let options = SaveOptions::default()
            .max_shard_bytes(1)
            .on_progress(move |progress| cancels.store(progress.ready_tensors == 1, Ordering::Relaxed))
            .cancel_on(cancel);
        let tensors = vec![counting("a", Dtype::U8, 9), counting("b", Dtype::U8, 9)];
        let error = save(&outer.path().join("out"), tensors, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(names(outer.path()).is_empty());
    }

    #[test]
    fn what_no_reader_would_accept_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let refused =
            |tensors| save(folder.path(), tensors, &SaveOptions::default().max_shard_bytes(1)).unwrap_err();
        let wrong = SaveTensor { shape: vec![3, 1], ..counting("w", Dtype::F32, 2) };
        let error = refused(vec![wrong]);
        assert_eq!(error.one_line(), "tensor \"w\": its source has 8 bytes, F32 [3, 1] needs 12");
        let twice = || counting("w", Dtype::F32, 2);
        assert_eq!(refused(vec![twice(), twice()]).kind(), ErrorKind::BadRequest);
        assert_eq!(refused(vec![counting("__metadata__", Dtype::F32, 2)]).kind(), ErrorKind::BadRequest);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_folder_with_a_checkpoint_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let save_one = || save(folder.path(), vec![counting("w", Dtype::F32, 2)], &SaveOptions::default());
        save_one().unwrap();
        assert_eq!(save_one().unwrap_err().kind(), ErrorKind::BadRequest);
        let file = folder.path().join("model.safetensors");
        save_file(&file, vec![counting("v", Dtype::F32, 3)], &SaveOptions::default()).unwrap();
        assert!(Model::open(&file).unwrap().tensor("v").is_ok());
    }
}
