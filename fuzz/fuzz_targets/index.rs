//! An index is read as a naive reader reads it, and agrees with headers made from it.
#![no_main]

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use libfuzzer_sys::fuzz_target;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use tensorhaul_plan::dtype::Dtype;
use tensorhaul_plan::header::{Header, NewTensor, encode};
use tensorhaul_plan::index::{Index, IndexError, check_file_name};

fuzz_target!(|json: &[u8]| {
    let naive = serde_json::from_slice::<Naive>(json).ok().and_then(|naive| naive.read());
    match Index::parse(json) {
        Ok(index) => {
            let (weight_map, total_size) = naive.expect("we accept what the naive reader refuses");
            let read: Vec<(String, String)> = index
                .entries()
                .map(|(tensor, file)| (tensor.to_owned(), index.files()[file].clone()))
                .collect();
            assert_eq!(read, weight_map);
            assert!(index.entries().all(|(tensor, file)| index.file_index(tensor) == Some(file)));
            assert!(index.files().is_sorted_by(|a, b| a < b));
            assert!(index.files().iter().all(|file| check_file_name(file).is_ok()));
            if let Some(total_size) = total_size {
                assert_eq!(index.total_size(), Some(total_size));
            }
            check_files(&index);
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() < 5000 && !text.contains('\n'), "{text}");
            let stricter =
                matches!(&error, IndexError::FileName { file, .. } if check_file_name(file).is_err());
            assert!(naive.is_none() || stricter, "we refuse what the naive reader accepts: {text}");
        }
    }
});

/// Tensors and their files, in the order of the index.
type WeightMap = Vec<(String, String)>;

/// An index as lists of pairs, so that keys that occur twice stay visible.
struct Naive {
    others: Vec<(String, Value)>,
    weight_maps: Vec<Pairs<String>>,
}

impl Naive {
    /// Returns the weight map and the total size where it is an integer, or `None` for what is no index.
    fn read(mut self) -> Option<(WeightMap, Option<u64>)> {
        let Pairs(weight_map) = self.weight_maps.pop()?;
        let metadata: Vec<&Value> =
            self.others.iter().filter(|(key, _)| key == "metadata").map(|(_, value)| value).collect();
        let names: BTreeMap<&str, &str> =
            weight_map.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str())).collect();
        if !self.weight_maps.is_empty() || metadata.len() > 1 || names.len() < weight_map.len() {
            return None;
        }
        let total_size = match metadata.first() {
            None | Some(Value::Null) => None,
            Some(Value::Object(metadata)) => metadata.get("total_size").and_then(Value::as_u64),
            Some(_) => return None,
        };
        Some((weight_map, total_size))
    }
}

impl<'de> Deserialize<'de> for Naive {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Naive, D::Error> {
        deserializer.deserialize_map(Naive { others: Vec::new(), weight_maps: Vec::new() })
    }
}

impl<'de> Visitor<'de> for Naive {
    type Value = Naive;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an index")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Naive, A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "weight_map" {
                self.weight_maps.push(map.next_value()?);
            } else {
                self.others.push((key, map.next_value()?));
            }
        }
        Ok(self)
    }
}

/// A map as a list.
struct Pairs<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Pairs<T>, D::Error> {
        deserializer.deserialize_map(PairsVisitor(PhantomData))
    }
}

struct PairsVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for PairsVisitor<T> {
    type Value = Pairs<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Pairs(pairs))
    }
}

/// Builds the files that the index describes, which must pass, then moves a tensor.
fn check_files(index: &Index) {
    let mut files: Vec<Vec<&str>> = vec![Vec::new(); index.files().len()];
    for (tensor, file) in index.entries().filter(|(tensor, _)| *tensor != "__metadata__") {
        files[file].push(tensor);
    }
    let headers = |files: &[Vec<&str>]| files.iter().map(|names| header(names)).collect::<Vec<_>>();
    // No file can hold a tensor of this name.
    let reserved = index.file_index("__metadata__").is_some();
    assert_eq!(index.check_against(&headers(&files)).is_err(), reserved);
    if let Some(moved) = files.iter_mut().find_map(Vec::pop) {
        assert!(index.check_against(&headers(&files)).is_err(), "missing");
        files.last_mut().expect("at least one file").push(moved);
        let right_place = index.file_index(moved) == Some(files.len() - 1);
        assert_eq!(index.check_against(&headers(&files)).is_err(), !right_place || reserved, "moved");
    }
}

/// A header of scalars with these names.
fn header(names: &[&str]) -> Header {
    let tensors: Vec<NewTensor<'_>> =
        names.iter().map(|name| NewTensor { name, dtype: Dtype::U8, shape: &[] }).collect();
    let bytes = encode(&tensors, &BTreeMap::new(), 1).expect("names listed once");
    Header::parse(&bytes[8..], bytes.len() as u64 + names.len() as u64).expect("what was encoded")
}
