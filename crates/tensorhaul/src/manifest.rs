//! Manifests: the xxh3-64 of every tensor of a checkpoint, written once and compared later.
//!
//! A manifest is JSON: `{"format": "tensorhaul-manifest", "version": 1, "algorithm": "xxh3-64", "tensors": {NAME:
//! {"dtype": "BF16", "shape": [2, 3], "bytes": 12, "xxh3_64": "16 hexadecimal digits"}}}`. It speaks of tensors, not
//! of files, so it also fits the same checkpoint in other shards. xxh3 finds damage, not malice.
//!
//! # Source
//! xxHash 0.8, XXH3_64bits with seed 0, over the tensor's bytes as stored.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::fmt;
use std::path::Path;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tensorhaul_plan::Dtype;

use crate::atomic;
use crate::error::{Error, ErrorKind, Result};
use crate::locate::read_limited;
use crate::model::Model;
use crate::options::LoadOptions;
use crate::report::Report;

/// What the tensors of a checkpoint should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    tensors: BTreeMap<String, Entry>,
}

/// What one tensor should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// The element type.
    pub dtype: Dtype,
    /// The dims in elements.
    pub shape: Vec<u64>,
    /// The number of bytes.
    pub bytes: u64,
    /// The checksum of the bytes.
    pub xxh3_64: Xxh3,
}

/// An xxh3-64; prints as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xxh3(pub u64);

impl Manifest {
    /// Computes the manifest of a model by loading it, and returns the load's report with it.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn of(model: &Model, options: &LoadOptions) -> Result<(Manifest, Report)> {
        let loaded = model.load(&options.clone().checksums(true))?;
        let checksums =
            loaded.report.checksums.as_ref().expect("a load that is asked for checksums has them");
        let entry = |(name, tensor): (&str, &crate::Tensor)| {
            let xxh3_64 = Xxh3::parse(&checksums[name]).expect("checksums are hexadecimal");
            let (shape, bytes) = (tensor.shape().to_vec(), tensor.len_bytes());
            (name.to_owned(), Entry { dtype: tensor.dtype(), shape, bytes, xxh3_64 })
        };
        let tensors = loaded.tensors.iter().map(entry).collect();
        Ok((Manifest { tensors }, loaded.report))
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::Io`]; [`ErrorKind::Malformed`] for what is no manifest, one of
    /// more than [`MANIFEST_LEN_BYTES_MAX`], and one that names a tensor twice; [`ErrorKind::Unsupported`]
    /// for another version or algorithm.
    pub fn read(path: &Path) -> Result<Manifest> {
        let json = read_limited(path, MANIFEST_LEN_BYTES_MAX)?;
        Manifest::parse(&json).map_err(|error| error.in_file(path))
    }

    fn parse(json: &[u8]) -> Result<Manifest> {
        let malformed =
            |error: serde_json::Error| Error::new(ErrorKind::Malformed, format!("is no manifest: {error}"));
        let Head { format, version, algorithm } = serde_json::from_slice(json).map_err(malformed)?;
        if format != FORMAT {
            return Err(Error::new(
                ErrorKind::Malformed,
                format!("is no manifest: its format is {format:?}, not {FORMAT:?}"),
            ));
        }
        if version != VERSION || algorithm != ALGORITHM {
            let what = format!(
                "is a manifest of version {version} with {algorithm:?}; version {VERSION} with {ALGORITHM:?} is known"
            );
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let Body { tensors } = serde_json::from_slice(json).map_err(malformed)?;
        Ok(Manifest { tensors: tensors.0 })
    }

    /// Writes the manifest, over whatever has its name: readers see the old file or the new one.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] when something that is no manifest has the name, so that a mistyped command
    /// destroys nothing; I/O errors.
    pub fn write(&self, path: &Path) -> Result<()> {
        if std::fs::symlink_metadata(path).is_ok()
            && let Err(error) = Manifest::read(path)
        {
            let what = format!("exists, is no manifest, and is not overwritten ({})", error.one_line());
            return Err(Error::bad_request(what).in_file(path));
        }
        atomic::write_file(path, &self.to_json())
    }

    /// A line for each tensor, so that two manifests can be compared line by line.
    fn to_json(&self) -> Vec<u8> {
        let mut json = format!(
            "{{\"format\":\"{FORMAT}\",\"version\":{VERSION},\"algorithm\":\"{ALGORITHM}\",\"tensors\":{{"
        );
        for (place, (name, entry)) in self.tensors.iter().enumerate() {
            let name = serde_json::to_string(name).expect("strings always serialize");
            let entry = serde_json::to_string(entry).expect("strings and numbers always serialize");
            json += &format!("{}\n{name}:{entry}", if place == 0 { "" } else { "," });
        }
        json += "\n}}\n";
        json.into_bytes()
    }

    /// Returns the tensors, by name.
    pub fn tensors(&self) -> &BTreeMap<String, Entry> {
        &self.tensors
    }

    /// Returns how `found` differs from this manifest, by tensor; nothing when it does not.
    pub fn differences(&self, found: &Manifest) -> Vec<Difference> {
        let names =
            self.tensors.keys().chain(found.tensors.keys().filter(|name| !self.tensors.contains_key(*name)));
        let mut differences: Vec<_> = names
            .filter_map(|name| {
                let what = what_differs(self.tensors.get(name), found.tensors.get(name))?;
                Some(Difference { tensor: name.clone(), what })
            })
            .collect();
        differences.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        differences
    }
}

/// The first that differs, from the coarsest: different dtypes always have different bytes.
fn what_differs(expected: Option<&Entry>, found: Option<&Entry>) -> Option<What> {
    let (expected, found) = match (expected, found) {
        (Some(expected), Some(found)) => (expected, found),
        (Some(_), None) => return Some(What::Missing),
        (None, _) => return Some(What::Extra),
    };
    if expected.dtype != found.dtype {
        return Some(What::Dtype { expected: expected.dtype, found: found.dtype });
    }
    if expected.shape != found.shape {
        return Some(What::Shape { expected: expected.shape.clone(), found: found.shape.clone() });
    }
    if expected.bytes != found.bytes {
        return Some(What::Bytes { expected: expected.bytes, found: found.bytes });
    }
    let (expected, found) = (expected.xxh3_64, found.xxh3_64);
    (expected != found).then_some(What::Checksum { expected, found })
}

/// A tensor that is not as the manifest has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Its name.
    pub tensor: String,
    /// What differs.
    #[serde(flatten)]
    pub what: What,
}

/// How a tensor differs from its manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "lowercase")]
#[non_exhaustive]
pub enum What {
    /// The checkpoint does not have it.
    Missing,
    /// The manifest does not have it.
    Extra,
    /// The element type.
    Dtype {
        /// In the manifest.
        expected: Dtype,
        /// In the checkpoint.
        found: Dtype,
    },
    /// The shape.
    Shape {
        /// In the manifest.
        expected: Vec<u64>,
        /// In the checkpoint.
        found: Vec<u64>,
    },
    /// The number of bytes: the manifest contradicts itself.
    Bytes {
        /// In the manifest.
        expected: u64,
        /// In the checkpoint.
        found: u64,
    },
    /// The bytes.
    Checksum {
        /// In the manifest.
        expected: Xxh3,
        /// In the checkpoint.
        found: Xxh3,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor {:?}: ", self.tensor)?;
        match &self.what {
            What::Missing => write!(f, "is missing"),
            What::Extra => write!(f, "is not in the manifest"),
            What::Dtype { expected, found } => write!(f, "dtype {found}, the manifest has {expected}"),
            What::Shape { expected, found } => write!(f, "shape {found:?}, the manifest has {expected:?}"),
            What::Bytes { expected, found } => write!(f, "{found} bytes, the manifest has {expected}"),
            What::Checksum { expected, found } => write!(f, "xxh3-64 {found}, the manifest has {expected}"),
        }
    }
}

impl Xxh3 {
    fn parse(text: &str) -> Option<Xxh3> {
        let is_hex = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex.then(|| u64::from_str_radix(text, 16).ok().map(Xxh3))?
    }
}

impl fmt::Display for Xxh3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for Xxh3 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What says how to read the rest. Unknown keys are left to later versions.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
    algorithm: String,
}

#[derive(Deserialize)]
struct Body {
    tensors: Unique,
}

/// Tensors by name, each once.
struct Unique(BTreeMap<String, Entry>);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unique, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Unique;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique, A::Error> {
                let mut tensors = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    match tensors.entry(name) {
                        MapEntry::Vacant(place) => {
                            place.insert(map.next_value()?);
                        }
                        MapEntry::Occupied(place) => {
                            return Err(A::Error::custom(format!("tensor {:?} occurs twice", place.key())));
                        }
                    }
                }
                Ok(Unique(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entry, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            dtype: String,
            shape: Vec<u64>,
            bytes: u64,
            xxh3_64: String,
        }
        let Raw { dtype, shape, bytes, xxh3_64 } = Raw::deserialize(deserializer)?;
        let dtype =
            Dtype::from_name(&dtype).ok_or_else(|| D::Error::custom(format!("{dtype:?} is no dtype")))?;
        let xxh3_64 = Xxh3::parse(&xxh3_64).ok_or_else(|| {
            D::Error::custom(format!("{xxh3_64:?} is no xxh3-64: 16 hexadecimal digits are"))
        })?;
        Ok(Entry { dtype, shape, bytes, xxh3_64 })
    }
}

const FORMAT: &str = "tensorhaul-manifest";
const VERSION: u32 = 1;
const ALGORITHM: &str = "xxh3-64";

/// The longest manifest accepted, in bytes: more than a million tensors of 200 bytes each.
pub const MANIFEST_LEN_BYTES_MAX: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(tensors: &str) -> Result<Manifest> {
        let head = r#""format":"tensorhaul-manifest","version":1,"algorithm":"xxh3-64""#;
        Manifest::parse(format!("{{{head},\"tensors\":{{{tensors}}}}}").as_bytes())
    }

    fn tensor(name: &str, dtype: &str, shape: &str, bytes: u64, hash: u64) -> String {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"bytes":{bytes},"xxh3_64":"{hash:016x}"}}"#)
    }

    #[test]
    fn a_manifest_reads_back_and_finds_a_changed_byte() {
        let model =
            Model::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/tiny-llama")).unwrap();
        let (written, report) = Manifest::of(&model, &LoadOptions::default()).unwrap();
        assert_eq!(written.tensors().len() as u64, report.tensors);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest.json");
        written.write(&path).unwrap();
        let read = Manifest::read(&path).unwrap();
        assert_eq!(read, written);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), written.tensors().len() + 2);
        assert!(
            serde_json::from_str::<serde_json::Value>(&text).unwrap()["tensors"]["lm_head.weight"]["bytes"]
                == 49152
        );
        assert!(read.differences(&written).is_empty());
        written.write(&path).unwrap();
    }

    #[test]
    fn every_kind_of_difference_is_told() {
        let of = |tensors: &[String]| manifest(&tensors.join(",")).unwrap();
        let expected = of(&[
            tensor("checksum", "F32", "[2]", 8, 1),
            tensor("dtype", "F32", "[2]", 8, 1),
            tensor("missing", "F32", "[2]", 8, 1),
            tensor("same", "F32", "[2]", 8, 1),
            tensor("shape", "F32", "[2]", 8, 1),
        ]);
        let found = of(&[
            tensor("checksum", "F32", "[2]", 8, 2),
            tensor("dtype", "I32", "[2]", 8, 1),
            tensor("extra", "F32", "[2]", 8, 1),
            tensor("same", "F32", "[2]", 8, 1),
            tensor("shape", "F32", "[1,2]", 8, 1),
        ]);
        let text: Vec<String> = expected.differences(&found).iter().map(Difference::to_string).collect();
        assert_eq!(
            text,
            [
                "tensor \"checksum\": xxh3-64 0000000000000002, the manifest has 0000000000000001",
                "tensor \"dtype\": dtype I32, the manifest has F32",
                "tensor \"extra\": is not in the manifest",
                "tensor \"missing\": is missing",
                "tensor \"shape\": shape [1, 2], the manifest has [2]",
            ]
        );
        let json = serde_json::to_string(&expected.differences(&found)[0]).unwrap();
        assert_eq!(
            json,
            r#"{"tensor":"checksum","what":"checksum","expected":"0000000000000001","found":"0000000000000002"}"#
        );
    }

    #[test]
    fn what_is_no_manifest_is_told_apart() {
        let kind = |json: &str| Manifest::parse(json.as_bytes()).unwrap_err().kind();
        assert_eq!(kind("[]"), ErrorKind::Malformed);
        assert_eq!(kind(r#"{"format":"x","version":1,"algorithm":"xxh3-64"}"#), ErrorKind::Malformed);
        assert_eq!(
            kind(r#"{"format":"tensorhaul-manifest","version":2,"algorithm":"xxh3-64"}"#),
            ErrorKind::Unsupported
        );
        assert_eq!(
            kind(r#"{"format":"tensorhaul-manifest","version":1,"algorithm":"md5"}"#),
            ErrorKind::Unsupported
        );
        assert_eq!(
            kind(r#"{"format":"tensorhaul-manifest","version":1,"version":1,"algorithm":"md5"}"#),
            ErrorKind::Malformed
        );
        let twice = [tensor("w", "F32", "[]", 4, 1), tensor("w", "F32", "[]", 4, 1)].join(",");
        assert!(manifest(&twice).unwrap_err().one_line().contains("\"w\" occurs twice"));
        for bad in [
            tensor("w", "F31", "[]", 4, 1),
            tensor("w", "F32", "[-1]", 4, 1),
            tensor("w", "F32", "[]", 4, 1).replace("0000", "+000"),
        ] {
            assert_eq!(manifest(&bad).unwrap_err().kind(), ErrorKind::Malformed, "{bad}");
        }
    }

    #[test]
    fn a_manifest_overwrites_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        std::fs::write(&path, "precious").unwrap();
        let error = manifest("").unwrap().write(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
