//! The reading side: one pass over the JSON into the arenas, then the checks across tensors.
//!
//! The visitors repeat what the reference's derived ones do with a buffered entry: each accepts every
//! JSON shape that `serde` would have accepted there, in one pass and without an allocation per tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;
use hashbrown::hash_table;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::json::{self, Any};
use super::{Entry, Header, HeaderError, LEN_PREFIX_BYTES, header_len_bytes};
use crate::dtype::{Dtype, numel};

pub(super) fn parse(json: &[u8], file_len_bytes: u64) -> Result<Header, HeaderError> {
    let header_len_bytes = header_len_bytes((json.len() as u64).to_le_bytes(), file_len_bytes)?;
    let text = std::str::from_utf8(json)
        .map_err(|error| HeaderError::NotUtf8 { at_bytes: LEN_PREFIX_BYTES + error.valid_up_to() as u64 })?;
    let Arenas { names, dims, mut entries, metadata, .. } = read(text)?;
    // Nearly every writer lists tensors in the order of their data. The name's place breaks ties between
    // empty tensors, so that equal headers parse to equal order.
    if !entries.is_sorted_by_key(|entry| entry.data_offsets) {
        entries.sort_unstable_by_key(|entry| (entry.data_offsets, entry.name_start, entry.name_len_bytes));
    }
    let mut header = Header {
        by_name: HashTable::with_capacity(entries.len()),
        names,
        dims,
        entries,
        hasher: RandomState::new(),
        metadata: metadata.unwrap_or_default(),
        data_start_bytes: LEN_PREFIX_BYTES + header_len_bytes,
    };
    header.index_names()?;
    header.check_tiling()?;
    header.check_file_len(file_len_bytes)?;
    Ok(header)
}

/// Runs the visitors over the JSON, and gives their errors a place in the file.
fn read(text: &str) -> Result<Arenas, HeaderError> {
    let mut arenas = Arenas::default();
    let mut json = serde_json::Deserializer::from_str(text);
    let outcome = json.deserialize_map(HeaderVisitor(&mut arenas)).and_then(|()| json.end());
    let Err(error) = outcome else {
        return Ok(arenas);
    };
    let at_bytes = LEN_PREFIX_BYTES + json::error_at(text, &error);
    let message = json::error_text(&error);
    Err(match (arenas.reading, arenas.unknown_dtype.take()) {
        (Some(Key::Tensor(name)), Some(dtype)) => {
            HeaderError::UnknownDtype { tensor: arenas.name(name).to_owned(), dtype, at_bytes }
        }
        (Some(Key::Tensor(name)), None) => {
            HeaderError::Json { tensor: Some(arenas.name(name).to_owned()), at_bytes, message }
        }
        (Some(Key::Metadata), _) => {
            HeaderError::Json { tensor: None, at_bytes, message: format!("__metadata__: {message}") }
        }
        (None, _) => HeaderError::Json { tensor: None, at_bytes, message },
    })
}

impl Header {
    fn index_names(&mut self) -> Result<(), HeaderError> {
        let Header { names, entries, by_name, hasher, .. } = self;
        let name_of = |index: u32| {
            let entry = &entries[index as usize];
            &names[entry.name_start as usize..][..entry.name_len_bytes as usize]
        };
        for index in 0..entries.len() as u32 {
            let name = name_of(index);
            let slot = by_name.entry(
                hasher.hash_one(name),
                |&other| name_of(other) == name,
                |&other| hasher.hash_one(name_of(other)),
            );
            match slot {
                hash_table::Entry::Vacant(slot) => slot.insert(index),
                hash_table::Entry::Occupied(other) => {
                    let data_offsets =
                        [*other.get(), index].map(|index| entries[index as usize].data_offsets);
                    return Err(HeaderError::DuplicateTensor { tensor: name.to_owned(), data_offsets });
                }
            };
        }
        Ok(())
    }

    /// Checks that each tensor begins where the one before ends, and has the bytes its shape needs.
    fn check_tiling(&self) -> Result<(), HeaderError> {
        let mut expected_start_bytes = 0;
        for info in self.tensors() {
            let tensor = || info.name.to_owned();
            let data_offsets @ (start, end) = info.data_offsets;
            let data_start_bytes = self.data_start_bytes;
            if end < start {
                return Err(HeaderError::ReversedOffsets {
                    tensor: tensor(),
                    data_offsets,
                    data_start_bytes,
                });
            }
            if start > expected_start_bytes {
                let tensor = tensor();
                return Err(HeaderError::Gap {
                    tensor,
                    data_offsets,
                    expected_start_bytes,
                    data_start_bytes,
                });
            }
            if start < expected_start_bytes {
                let tensor = tensor();
                return Err(HeaderError::Overlap {
                    tensor,
                    data_offsets,
                    expected_start_bytes,
                    data_start_bytes,
                });
            }
            let expected_len_bytes = len_bytes(info.name, info.dtype, info.shape)?;
            if info.len_bytes() != expected_len_bytes {
                return Err(HeaderError::LenMismatch {
                    tensor: tensor(),
                    dtype: info.dtype,
                    shape: info.shape.to_vec(),
                    expected_len_bytes,
                    data_offsets,
                    data_start_bytes,
                });
            }
            expected_start_bytes = end;
        }
        Ok(())
    }

    fn check_file_len(&self, file_len_bytes: u64) -> Result<(), HeaderError> {
        // `parse` has seen that the JSON ends within the file.
        let data_len_bytes = file_len_bytes - self.data_start_bytes;
        if self.data_len_bytes() < data_len_bytes {
            let data_end_bytes = self.data_start_bytes + self.data_len_bytes();
            return Err(HeaderError::TrailingBytes { data_end_bytes, file_len_bytes });
        }
        let whole = self.entries.partition_point(|entry| entry.data_offsets.1 <= data_len_bytes);
        match self.entries.get(whole).map(|entry| self.info(entry)) {
            None => Ok(()),
            Some(cut) => Err(HeaderError::DataTruncated {
                tensor: cut.name.to_owned(),
                data_offsets: cut.data_offsets,
                data_start_bytes: self.data_start_bytes,
                file_len_bytes,
            }),
        }
    }
}

/// Returns the bytes of a tensor, or says which tensor has an impossible shape.
pub(super) fn len_bytes(name: &str, dtype: Dtype, shape: &[u64]) -> Result<u64, HeaderError> {
    let overflow = || HeaderError::ShapeOverflow { tensor: name.to_owned(), dtype, shape: shape.to_vec() };
    let numel = numel(shape).ok_or_else(overflow)?;
    numel.checked_mul(dtype.bits()).ok_or_else(overflow)?;
    dtype.len_bytes(numel).ok_or_else(|| HeaderError::PartialByte {
        tensor: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    })
}

/// What the visitors fill.
#[derive(Default)]
struct Arenas {
    names: String,
    dims: Vec<u64>,
    entries: Vec<Entry>,
    metadata: Option<BTreeMap<String, String>>,
    seen_metadata: bool,
    /// The key whose value is being read, for errors.
    reading: Option<Key>,
    unknown_dtype: Option<String>,
}

impl Arenas {
    fn name(&self, name: Name) -> &str {
        &self.names[name.start as usize..][..name.len_bytes as usize]
    }
}

/// A key of the header.
#[derive(Clone, Copy)]
enum Key {
    Metadata,
    Tensor(Name),
}

/// A name in [`Arenas::names`].
#[derive(Clone, Copy)]
struct Name {
    start: u32,
    len_bytes: u32,
}

/// The whole header: `{"__metadata__": {...}, NAME: {...}, ...}`.
struct HeaderVisitor<'a>(&'a mut Arenas);

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let arenas = self.0;
        while let Some(key) = map.next_key_seed(KeySeed(arenas))? {
            match key {
                Key::Metadata if arenas.seen_metadata => {
                    return Err(A::Error::duplicate_field("__metadata__"));
                }
                _ => arenas.reading = Some(key),
            }
            match key {
                Key::Tensor(name) => map.next_value_seed(EntrySeed { arenas, name })?,
                Key::Metadata => {
                    arenas.seen_metadata = true;
                    arenas.metadata = map.next_value()?;
                }
            }
            arenas.reading = None;
        }
        Ok(())
    }
}

/// Reads a [`Key`], and keeps a tensor's name in the arena.
struct KeySeed<'a>(&'a mut Arenas);

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor's name")
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        if key == "__metadata__" {
            return Ok(Key::Metadata);
        }
        let names = &mut self.0.names;
        let name = Name { start: names.len() as u32, len_bytes: key.len() as u32 };
        names.push_str(key);
        Ok(Key::Tensor(name))
    }
}

/// One entry: `{"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}`, or the same as an array.
struct EntrySeed<'a> {
    arenas: &'a mut Arenas,
    name: Name,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Dtype,
    Shape,
    DataOffsets,
    #[serde(other)]
    Unknown,
}

impl EntrySeed<'_> {
    fn keep(self, dtype: Dtype, (dims_start, ndim): (u32, u32), data_offsets: DataOffsets) {
        let DataOffsets(start, end) = data_offsets;
        let data_offsets = (start, end);
        let Name { start: name_start, len_bytes: name_len_bytes } = self.name;
        self.arenas.entries.push(Entry { data_offsets, name_start, name_len_bytes, dims_start, ndim, dtype });
    }
}

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor's dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
        while let Some(field) = map.next_key()? {
            match field {
                Field::Dtype if dtype.is_some() => return Err(A::Error::duplicate_field("dtype")),
                Field::Shape if shape.is_some() => return Err(A::Error::duplicate_field("shape")),
                Field::DataOffsets if data_offsets.is_some() => {
                    return Err(A::Error::duplicate_field("data_offsets"));
                }
                Field::Dtype => dtype = Some(map.next_value_seed(DtypeSeed(self.arenas))?),
                Field::Shape => shape = Some(map.next_value_seed(ShapeSeed(&mut self.arenas.dims))?),
                Field::DataOffsets => data_offsets = Some(map.next_value::<DataOffsets>()?),
                Field::Unknown => {
                    map.next_value::<Any>()?;
                }
            }
        }
        let dtype = dtype.ok_or_else(|| A::Error::missing_field("dtype"))?;
        let shape = shape.ok_or_else(|| A::Error::missing_field("shape"))?;
        let data_offsets = data_offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?;
        self.keep(dtype, shape, data_offsets);
        Ok(())
    }

    /// `serde_json` refuses further elements after this returns.
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let missing = |found| A::Error::invalid_length(found, &"dtype, shape and data_offsets");
        let dtype = seq.next_element_seed(DtypeSeed(self.arenas))?.ok_or_else(|| missing(0))?;
        let shape = seq.next_element_seed(ShapeSeed(&mut self.arenas.dims))?.ok_or_else(|| missing(1))?;
        let data_offsets = seq.next_element::<DataOffsets>()?.ok_or_else(|| missing(2))?;
        self.keep(dtype, shape, data_offsets);
        Ok(())
    }
}

/// An element type: `"F32"`, or `{"F32": null}` as `serde` writes enums with content.
struct DtypeSeed<'a>(&'a mut Arenas);

impl<'de> DeserializeSeed<'de> for DtypeSeed<'_> {
    type Value = Dtype;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Dtype, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for DtypeSeed<'_> {
    type Value = Dtype;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a dtype")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Dtype, E> {
        Dtype::from_name(name).ok_or_else(|| {
            self.0.unknown_dtype = Some(name.to_owned());
            E::custom("unknown dtype")
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Dtype, A::Error> {
        let dtype = map
            .next_key_seed(DtypeSeed(self.0))?
            .ok_or_else(|| A::Error::invalid_length(0, &"the name of a dtype"))?;
        map.next_value::<()>()?;
        match map.next_key::<Any>()? {
            None => Ok(dtype),
            Some(_) => Err(A::Error::invalid_length(2, &"the name of one dtype")),
        }
    }
}

/// A shape, kept in the arena; returns its first dim's index there and the number of dims.
struct ShapeSeed<'a>(&'a mut Vec<u64>);

impl<'de> DeserializeSeed<'de> for ShapeSeed<'_> {
    type Value = (u32, u32);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(u32, u32), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed<'_> {
    type Value = (u32, u32);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a shape: a list of dims")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(u32, u32), A::Error> {
        let dims_start = self.0.len();
        while let Some(Whole(dim)) = seq.next_element()? {
            self.0.push(dim);
        }
        Ok((dims_start as u32, (self.0.len() - dims_start) as u32))
    }
}

/// Where a tensor's data begins and ends.
struct DataOffsets(u64, u64);

impl<'de> Deserialize<'de> for DataOffsets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DataOffsets, D::Error> {
        deserializer.deserialize_seq(DataOffsets(0, 0))
    }
}

impl<'de> Visitor<'de> for DataOffsets {
    type Value = DataOffsets;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("data_offsets: a start and an end")
    }

    /// `serde_json` refuses further elements after this returns.
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<DataOffsets, A::Error> {
        let Whole(start) = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(0, &self))?;
        let Whole(end) = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(1, &self))?;
        Ok(DataOffsets(start, end))
    }
}

/// A number written without sign, fraction or exponent; `serde`'s `u64`, with a clearer error.
struct Whole(u64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Whole, D::Error> {
        deserializer.deserialize_u64(Whole(0))
    }
}

impl Visitor<'_> for Whole {
    type Value = Whole;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number below 2^64")
    }

    fn visit_u64<E>(self, number: u64) -> Result<Whole, E> {
        Ok(Whole(number))
    }
}
