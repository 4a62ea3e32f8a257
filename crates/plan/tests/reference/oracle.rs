//! The reference crate's verdict beside ours, for the tests here and the fuzz target `header`.

use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use tensorhaul_plan::header::{Header, HeaderError, LEN_PREFIX_BYTES, header_len_bytes};

/// What both readers make of a file.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Both accept it, and read the same from it.
    Accepted,
    /// Both refuse it; this is our reason.
    Refused(HeaderError),
    /// We refuse it, the reference accepts it, and the header module's documentation lists why.
    Differs(Difference, HeaderError),
}

/// The differences that the header module's documentation lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// Two entries have the same name after unescaping.
    NameTwice,
}

/// Reads a whole file with both readers.
///
/// # Panics
/// When the verdicts differ for a reason that isn't listed, or both accept it and read different things.
pub(crate) fn compare(file: &[u8]) -> Verdict {
    let ours = parse_file(file);
    let theirs = reference(file, &ours);
    match (ours, theirs) {
        (Ok(header), Ok((header_len_bytes, metadata))) => {
            assert_eq!(header.data_start_bytes(), LEN_PREFIX_BYTES + header_len_bytes as u64);
            assert_same(&header, &metadata);
            Verdict::Accepted
        }
        (Err(error), Err(_)) => Verdict::Refused(error),
        (Err(error @ HeaderError::DuplicateTensor { .. }), Ok(_)) => {
            Verdict::Differs(Difference::NameTwice, error)
        }
        (Err(error), Ok(_)) => panic!("we refuse what the reference accepts: {error}"),
        (Ok(_), Err(error)) => panic!("we accept what the reference refuses: {error}"),
    }
}

/// Parses a file as a loader would: the prefix, then the header behind it.
pub(crate) fn parse_file(file: &[u8]) -> Result<Header, HeaderError> {
    let file_len_bytes = file.len() as u64;
    let prefix = file.first_chunk().copied().unwrap_or_default();
    let json_len_bytes = header_len_bytes(prefix, file_len_bytes)?;
    Header::parse(&file[8..][..json_len_bytes as usize], file_len_bytes)
}

fn reference(file: &[u8], ours: &Result<Header, HeaderError>) -> Result<(usize, Metadata), String> {
    if matches!(ours, Err(HeaderError::DataTruncated { .. })) && end_of_file_overflows(file) {
        return Err(
            "the reference adds up the file's length unchecked, and panics in debug builds".to_owned()
        );
    }
    SafeTensors::read_metadata(file).map_err(|error| error.to_string())
}

/// Whether the data of a file, which is otherwise sound, would end beyond 2^64 - 1.
fn end_of_file_overflows(file: &[u8]) -> bool {
    let prefix = file.first_chunk().copied().unwrap_or_default();
    let data_start = 8 + u64::from_le_bytes(prefix) as usize;
    serde_json::from_slice(&file[8..data_start])
        .is_ok_and(|metadata: Metadata| metadata.data_len().checked_add(data_start).is_none())
}

fn assert_same(header: &Header, metadata: &Metadata) {
    assert_eq!(header.data_len_bytes(), metadata.data_len() as u64);
    assert_eq!(header.len(), metadata.tensors().len());
    assert_eq!(header.is_empty(), metadata.tensors().is_empty());
    assert_eq!(header.tensors().len(), header.len());
    let mut data_end_bytes = 0;
    for (index, info) in header.tensors().enumerate() {
        assert_eq!(header.find(info.name), Some(index));
        assert_eq!(header.tensor(index).name, info.name);
        let theirs = metadata.info(info.name).expect("a tensor that the reference has too");
        assert_eq!(info.dtype.name(), theirs.dtype.to_string());
        assert_eq!(info.dtype.bits(), theirs.dtype.bitsize() as u64);
        assert!(info.shape.iter().eq(theirs.shape.iter().map(|dim| *dim as u64).collect::<Vec<_>>().iter()));
        assert_eq!(info.data_offsets, (theirs.data_offsets.0 as u64, theirs.data_offsets.1 as u64));
        assert_eq!(info.data_offsets.0, data_end_bytes);
        assert_eq!(info.data_offsets.0 + info.len_bytes(), info.data_offsets.1);
        data_end_bytes = info.data_offsets.1;
    }
    let theirs = metadata.metadata().iter().flatten();
    assert_eq!(header.metadata().len(), theirs.clone().count());
    for (key, value) in theirs {
        assert_eq!(header.metadata().get(key), Some(value));
    }
}
