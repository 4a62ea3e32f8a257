//! One file of a checkpoint: its tensors in order, written from their sources through one buffer.

use std::cmp::Reverse;
use std::path::Path;
use std::sync::atomic::Ordering;

use tensorhaul_plan::HeaderError;
use tensorhaul_plan::header::{self, NewTensor};

use super::{SaveOptions, SaveTensor};
use crate::atomic::NewFile;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;

/// Puts the tensors of a file in the order in which they will be written, and tells them.
pub(super) fn arrange(tensors: &mut [SaveTensor<'_>]) {
    // Each tensor is aligned for its own dtype this way, because the format allows no holes between them.
    tensors.sort_by(|a, b| (Reverse(a.dtype), &a.name).cmp(&(Reverse(b.dtype), &b.name)));
    tensors.iter().for_each(|tensor| tensor.bytes.announce());
}

/// Writes one file, its tensors in this order, under its temporary name to storage.
pub(super) fn write_shard(
    target: &Path,
    tensors: &mut [SaveTensor<'_>],
    options: &SaveOptions,
    watch: &mut Watch<'_>,
) -> Result<NewFile> {
    let entries =
        tensors.iter().map(|SaveTensor { name, dtype, shape, .. }| NewTensor { name, dtype: *dtype, shape });
    let header = header::encode(&entries.collect::<Vec<_>>(), &options.metadata, DATA_ALIGN_BYTES)
        .map_err(|error| no_such_header(error, target))?;

    let mut file = NewFile::create(target)?;
    let data_len_bytes: u64 = tensors.iter().map(|tensor| tensor.bytes.len_bytes()).sum();
    file.reserve(header.len() as u64 + data_len_bytes)?;
    file.write(&header)?;
    let mut buffer = vec![0; data_len_bytes.min(BUFFER_LEN_BYTES as u64) as usize];
    let mut filled = 0;
    for tensor in tensors {
        let (mut offset, len_bytes) = (0, tensor.bytes.len_bytes());
        while offset < len_bytes {
            let space = &mut buffer[filled..];
            let piece = space.len().min((len_bytes - offset).try_into().unwrap_or(usize::MAX));
            tensor.bytes.fill(offset, &mut space[..piece]).map_err(|error| about(error, &tensor.name))?;
            offset += piece as u64;
            filled += piece;
            watch.totals.read_bytes += piece as u64;
            if filled == buffer.len() {
                file.write(&buffer)?;
                filled = 0;
                watch.look()?;
            }
        }
        watch.totals.ready_tensors += 1;
    }
    file.write(&buffer[..filled])?;
    watch.look()?;
    file.sync()?;
    watch.look()?; // Waiting for storage may have taken minutes.
    Ok(file)
}

fn no_such_header(error: HeaderError, target: &Path) -> Error {
    let tensor = error.tensor().map(str::to_owned);
    let error = Error::new(ErrorKind::BadRequest, error).in_file(target);
    match tensor {
        Some(tensor) => error.about_tensor(tensor),
        None => error,
    }
}

fn about(error: Error, tensor: &str) -> Error {
    if error.tensor().is_some() { error } else { error.about_tensor(tensor) }
}

/// Tells the caller how far the writing is, and hears whether to go on.
pub(super) struct Watch<'o> {
    pub(super) totals: Progress,
    options: &'o SaveOptions,
}

impl Watch<'_> {
    pub(super) fn new<'o>(tensors: &[SaveTensor<'_>], options: &'o SaveOptions) -> Watch<'o> {
        let total_bytes = tensors.iter().map(|tensor| tensor.bytes.len_bytes()).fold(0, u64::saturating_add);
        let totals = Progress { total_bytes, total_tensors: tensors.len() as u64, ..Progress::default() };
        Watch { totals, options }
    }

    fn look(&self) -> Result<()> {
        if let Some(progress) = &self.options.progress {
            progress(self.totals);
        }
        match &self.options.cancel {
            Some(cancel) if cancel.load(Ordering::Relaxed) => {
                Err(Error::new(ErrorKind::Cancelled, "cancelled; no file is left behind"))
            }
            _ => Ok(()),
        }
    }
}

/// Direct reads start at multiples of a page at most; see `tensorhaul_io::probe`.
pub(super) const DATA_ALIGN_BYTES: u64 = 4096;

/// Long enough that a write costs no more than its copy into the page cache, short enough to stay in a
/// core's cache beside what fills it. A multiple of every element's width, as is `DATA_ALIGN_BYTES`; widths
/// descend within a file: so no element crosses the end of the buffer.
pub(super) const BUFFER_LEN_BYTES: usize = 4 << 20;
const _: () = assert!((BUFFER_LEN_BYTES as u64).is_multiple_of(DATA_ALIGN_BYTES));
