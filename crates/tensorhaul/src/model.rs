//! An opened checkpoint: its files and its tensor table, before any tensor's bytes are read.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread;

use memmap2::Mmap;
use tensorhaul_io::OpenFile;
use tensorhaul_io::memory::Faults;
use tensorhaul_plan::header::{LEN_PREFIX_BYTES, header_len_bytes};
use tensorhaul_plan::quant::Quantization;
use tensorhaul_plan::{
    Checkpoint, DeviceId, DeviceMap, File, Header, Index, IndexError, Plan, Request, Select, Slice, TensorRef,
};

use crate::cancel::Cancel;
use crate::error::{Error, ErrorKind, Result};
use crate::loaded::Loaded;
use crate::locate::{Located, locate};
use crate::options::{Handover, LoadOptions};
use crate::private::Asking;
use crate::stream::TensorStream;
use crate::tensor::{Storage, Tensor};
use crate::{handover, mapping, private};

/// An opened checkpoint. Clones are handles of the same one.
///
/// Opening reads and checks the headers, and nothing else: bytes of tensors are read by
/// [`load`](Model::load), [`stream`](Model::stream), [`tensor`](Model::tensor) and [`slice`](Model::slice).
#[derive(Clone)]
pub struct Model {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) path: PathBuf,
    pub(crate) folder: PathBuf,
    pub(crate) source: Source,
    pub(crate) checkpoint: Arc<Checkpoint>,
    mappings: Vec<OnceLock<Arc<Mmap>>>,
    pub(crate) quantization: OnceLock<Arc<Quantization>>,
}

/// Where the bytes are.
pub(crate) enum Source {
    Files(Arc<[OpenFile]>),
    Memory { files: Vec<Arc<[u8]>>, faults: Faults },
}

impl Model {
    /// Opens what `path` names: a `.safetensors` file, a folder, a `.safetensors.index.json`, or an
    /// `org/name` found in the local Hugging Face cache. Nothing is downloaded.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] and [`ErrorKind::Malformed`], naming the file, and the tensor where one is
    /// at fault.
    pub fn open(path: impl AsRef<Path>) -> Result<Model> {
        let Located { files: paths, index, folder } = locate(path.as_ref())?;
        let opened = open_all(&paths)?;
        let mut files = Vec::with_capacity(paths.len());
        let (mut entries, mut headers) = (Vec::with_capacity(paths.len()), Vec::with_capacity(paths.len()));
        for (path, (file, header)) in paths.iter().zip(opened) {
            entries.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
            headers.push(header);
            files.push(file);
        }
        if let Some((path, index)) = &index {
            let wrong = |error| Error::index(look_beside(error, index, &folder), path);
            index.check_against(&headers).map_err(wrong)?;
        }
        let files_of_checkpoint =
            entries.into_iter().zip(headers).map(|(name, header)| File::new(name, header));
        let checkpoint = Checkpoint::new(files_of_checkpoint.collect())
            .map_err(|error| Error::from(error).in_file(path.as_ref()))?;
        Ok(Model::new(path.as_ref().to_owned(), folder, Source::Files(files.into()), checkpoint))
    }

    /// Opens files that are bytes in memory, by name, with faults for tests of what is built on this crate.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`], naming the file.
    pub fn from_memory(files: Vec<(String, Arc<[u8]>)>, faults: Faults) -> Result<Model> {
        let mut entries = Vec::with_capacity(files.len());
        let mut contents = Vec::with_capacity(files.len());
        for (name, bytes) in files {
            let header = parse_header(Path::new(&name), bytes.len() as u64, |target, offset| {
                let begin = (offset as usize).min(bytes.len());
                let end = (begin + target.len()).min(bytes.len());
                target[..end - begin].copy_from_slice(&bytes[begin..end]);
                if end - begin == target.len() {
                    Ok(())
                } else {
                    Err(std::io::ErrorKind::UnexpectedEof.into())
                }
            })?;
            entries.push(File::new(name, header));
            contents.push(bytes);
        }
        let checkpoint = Checkpoint::new(entries)?;
        Ok(Model::new("memory".into(), ".".into(), Source::Memory { files: contents, faults }, checkpoint))
    }

    fn new(path: PathBuf, folder: PathBuf, source: Source, checkpoint: Checkpoint) -> Model {
        let mappings = checkpoint.files().iter().map(|_| OnceLock::new()).collect();
        let checkpoint = Arc::new(checkpoint);
        let quantization = OnceLock::new();
        Model { inner: Arc::new(Inner { path, folder, source, checkpoint, mappings, quantization }) }
    }

    /// Returns the path it was opened by.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Returns the folder that config.json and its like are in.
    pub fn folder(&self) -> &Path {
        &self.inner.folder
    }

    /// Returns the files and their tensors.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.inner.checkpoint
    }

    /// Returns the path of a file, by its place in [`Checkpoint::files`].
    pub fn file_path(&self, file: usize) -> PathBuf {
        self.inner.file_path(file)
    }

    /// Tells what is quantized and how. Reads the configuration files beside the tensors, and the few bytes of small tensors that describe
    /// others, at the first call.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] when a configuration cannot be understood; I/O errors. Tensors that cannot be dequantized are no error:
    /// they are listed with the reason.
    pub fn quantization(&self) -> Result<Arc<Quantization>> {
        self.inner.quantization()
    }

    /// Plans a private load without doing it: every read, place and copy, and the memory they take.
    ///
    /// Initializes no driver, so that the process can still fork and its children load. A device whose driver this process has not
    /// initialized, by a load or by what opens devices, is taken for one of memory of its own that reaches no other;
    /// [`plan_for_devices`](Model::plan_for_devices) asks.
    ///
    /// # Errors
    /// As [`load`](Model::load) before its first read.
    pub fn plan(&self, options: &LoadOptions) -> Result<Plan> {
        private::plan(&self.inner, options, Asking::Nobody)
    }

    /// Plans as [`plan`](Model::plan) does, for the devices that are there: whether each shares the host's memory, and where tensors go to
    /// several, which reach each other.
    ///
    /// This initializes their drivers, as a load does; children forked from then on cannot load onto them. Devices are opened only for the second
    /// question. One that is not there is taken for one of memory of its own.
    ///
    /// # Errors
    /// As [`load`](Model::load) before its first read.
    pub fn plan_for_devices(&self, options: &LoadOptions) -> Result<Plan> {
        private::plan(&self.inner, options, Asking::Devices)
    }

    /// Makes a device map for a load by what is free on devices: layers whole and in their order, neighbours on the same device, each device filled in
    /// proportion. See [`DeviceMap::auto`] for what else is where. Opens the devices, because nothing else tells what is free: children forked
    /// from then on cannot load onto them. Without any given it is for all of the vendor of the
    /// request's own.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] when the layers do not fit, with the numbers; else as [`plan`](Model::plan), and
    /// [`ErrorKind::Device`] when a device does not tell what is free.
    pub fn device_map(&self, options: &LoadOptions, devices: &[DeviceId]) -> Result<DeviceMap> {
        mapping::auto(&self.inner, options, devices)
    }

    /// Loads tensors and waits for all of them.
    ///
    /// # Errors
    /// Every [`ErrorKind`]; on error nothing is handed over, and all memory and descriptors the load took
    /// are let go.
    pub fn load(&self, options: &LoadOptions) -> Result<Loaded> {
        handover::load(&self.inner, options, &Cancel::new())
    }

    /// Loads tensors on a thread of its own and hands each over when it is ready, in the order of
    /// readiness. Dropping the stream cancels what is left and waits for the thread.
    ///
    /// # Errors
    /// When the thread cannot be started; everything else comes through the stream.
    pub fn stream(&self, options: &LoadOptions) -> Result<TensorStream> {
        TensorStream::start(Arc::clone(&self.inner), options.clone())
    }

    /// Loads on a thread of its own, whatever runtime polls the future. Dropping the future cancels the
    /// load: no new read begins, and the thread ends when the reads in flight have.
    #[cfg(feature = "tokio")]
    pub fn load_async(&self, options: &LoadOptions) -> crate::asynchronous::LoadFuture {
        crate::asynchronous::LoadFuture::start(Arc::clone(&self.inner), options.clone())
    }

    /// Returns one tensor, mapped: its bytes are read when they are first touched.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] when there is no such tensor; I/O errors of mapping its file.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let found = self.find(name)?;
        match self.inner.source {
            Source::Files(_) => Ok(mapped(found, &self.inner.mapping(found.file as usize)?)),
            Source::Memory { .. } => self.load_one(name, None),
        }
    }

    /// Returns a part of one tensor. Leading rows are mapped like a whole tensor; a part that is not
    /// contiguous in the file is read at once, and only its bytes are.
    ///
    /// # Errors
    /// As [`tensor`](Model::tensor), and [`ErrorKind::BadRequest`] when the slice leaves the tensor.
    pub fn slice(&self, name: &str, slice: &Slice) -> Result<Tensor> {
        let found = self.find(name)?;
        let no_such_slice = |error| Error::new(ErrorKind::BadRequest, error).about_tensor(name);
        let pieces = slice.pieces(found.info.dtype, found.info.shape).map_err(no_such_slice)?;
        let shape = slice.shape(found.info.shape).map_err(no_such_slice)?;
        match (&self.inner.source, pieces.count()) {
            (Source::Files(_), 0 | 1) => {
                let offset = found.file_offset_bytes + pieces.offsets_bytes().next().unwrap_or(0);
                let map = Storage::Mapped(self.inner.mapping(found.file as usize)?);
                Ok(Tensor::new(found.info.dtype, &shape, map, offset, pieces.len_bytes()))
            }
            _ => self.load_one(name, Some(slice)),
        }
    }

    fn load_one(&self, name: &str, slice: Option<&Slice>) -> Result<Tensor> {
        let mut request = Request::of(Select::Names(vec![name.to_owned()]));
        request.slices = slice.map(|slice| (name.to_owned(), slice.clone())).into_iter().collect();
        let options = LoadOptions::default().request(request).handover(Handover::Private);
        let (_, tensor) =
            self.load(&options)?.tensors.into_iter().next().expect("one name selects one tensor");
        Ok(tensor)
    }

    fn find(&self, name: &str) -> Result<TensorRef<'_>> {
        self.checkpoint().find(name).ok_or_else(|| {
            let what =
                format!("no tensor is named {name:?} (the checkpoint has {})", self.checkpoint().len());
            Error::bad_request(what).about_tensor(name)
        })
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let checkpoint = self.checkpoint();
        write!(
            f,
            "Model({}, {} files, {} tensors)",
            self.path().display(),
            checkpoint.files().len(),
            checkpoint.len()
        )
    }
}

impl Inner {
    pub(crate) fn file_path(&self, file: usize) -> PathBuf {
        match &self.source {
            Source::Files(files) => files[file].path().to_owned(),
            Source::Memory { .. } => self.checkpoint.files()[file].name().into(),
        }
    }

    /// Returns the files, unless they are bytes in memory.
    pub(crate) fn files(&self) -> &[OpenFile] {
        match &self.source {
            Source::Files(files) => files,
            Source::Memory { .. } => &[],
        }
    }

    /// Returns the mapping of a file, made at the first call. Each call checks that the file is as it was.
    pub(crate) fn mapping(&self, file: usize) -> Result<Arc<Mmap>> {
        let Some(open) = self.files().get(file) else {
            return Err(Error::bad_request(
                "files that are bytes in memory cannot be mapped; load them privately",
            ));
        };
        open.check_unchanged()?;
        if let Some(map) = self.mappings[file].get() {
            return Ok(Arc::clone(map));
        }
        let map =
            tensorhaul_io::mmap::map(open).map_err(|error| Error::io("mapping it", open.path(), error))?;
        Ok(Arc::clone(self.mappings[file].get_or_init(|| Arc::new(map))))
    }

    /// Checks that nobody wrote to these files since they were opened. Numbers may repeat.
    pub(crate) fn check_unchanged(&self, files: impl Iterator<Item = u32>) -> Result<()> {
        let mut last = None;
        for file in files {
            // Reads come by file, so most repeats follow each other.
            if last != Some(file)
                && let Some(open) = self.files().get(file as usize)
            {
                open.check_unchanged()?;
            }
            last = Some(file);
        }
        Ok(())
    }
}

/// Returns a whole tensor in the mapping of its file.
pub(crate) fn mapped(tensor: TensorRef<'_>, map: &Arc<Mmap>) -> Tensor {
    let (info, map) = (tensor.info, Storage::Mapped(Arc::clone(map)));
    Tensor::new(info.dtype, info.shape, map, tensor.file_offset_bytes, info.len_bytes())
}

/// Opens files and parses their headers, several at once: on network storage each costs a round trip.
fn open_all(paths: &[PathBuf]) -> Result<Vec<(OpenFile, Header)>> {
    let stride = paths.len().div_ceil(OPEN_THREADS_MAX).max(1);
    if paths.len() < OPEN_THREADS_MAX {
        return paths.iter().map(|path| open_one(path)).collect();
    }
    thread::scope(|scope| {
        let open = |chunk: &'_ [PathBuf]| chunk.iter().map(|path| open_one(path)).collect::<Vec<_>>();
        let threads: Vec<_> = paths.chunks(stride).map(|chunk| scope.spawn(move || open(chunk))).collect();
        let opened =
            threads.into_iter().flat_map(|thread| thread.join().expect("opening a file does not panic"));
        opened.collect()
    })
}

fn open_one(path: &Path) -> Result<(OpenFile, Header)> {
    let file = OpenFile::open(path)?;
    let header =
        parse_header(path, file.len_bytes(), |target, offset| file.cached().read_exact_at(target, offset))?;
    Ok((file, header))
}

/// Reads the header of a file, and not a byte more.
/// Completes the error of a tensor that no listed file has, if a file that is not listed has it.
fn look_beside(error: IndexError, index: &Index, folder: &Path) -> IndexError {
    let IndexError::MissingTensor { tensor, file } = error else {
        return error;
    };
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".safetensors") && !index.files().contains(name))
        .collect();
    names.sort();
    let has_it = |name: &String| {
        // Only a hint is looked for: a file that cannot be read gives none.
        let opened = open_all(&[folder.join(name)]);
        opened.is_ok_and(|opened| opened.iter().any(|(_, header)| header.find(&tensor).is_some()))
    };
    match names.into_iter().find(has_it) {
        Some(found_in) => IndexError::WrongFile { tensor, file, found_in },
        None => IndexError::MissingTensor { tensor, file },
    }
}

fn parse_header(
    path: &Path,
    file_len_bytes: u64,
    read_exact_at: impl Fn(&mut [u8], u64) -> std::io::Result<()>,
) -> Result<Header> {
    let malformed = |error| Error::header(error, path);
    let failed = |error| Error::io("reading its header", path, error);
    let mut prefix = [0; LEN_PREFIX_BYTES as usize];
    let have = file_len_bytes.min(LEN_PREFIX_BYTES) as usize;
    read_exact_at(&mut prefix[..have], 0).map_err(failed)?;
    let len_bytes = header_len_bytes(prefix, file_len_bytes).map_err(malformed)?;
    let mut json = vec![0; len_bytes as usize]; // At most the header's cap.
    read_exact_at(&mut json, LEN_PREFIX_BYTES).map_err(failed)?;
    Header::parse(&json, file_len_bytes).map_err(malformed)
}

/// Enough to hide the latency of network storage; a local disk is done with a header in 0.1 ms.
const OPEN_THREADS_MAX: usize = 8;
