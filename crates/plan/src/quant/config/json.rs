//! JSON that keeps the order of its keys, which GPTQ's `dynamic` needs.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::header::json::{error_at, error_text};
use crate::quant::QuantError;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::quant) enum Json {
    Null,
    Flag(bool),
    Whole(i64),
    Real(f64),
    Text(String),
    List(Vec<Json>),
    Map(Map),
}

/// The entries of an object in the order of the text. Of keys that occur twice the last one counts, as for other readers.
pub(in crate::quant) type Map = Vec<(String, Json)>;

impl Json {
    /// Parses a text. `serde_json` refuses more than 128 levels of nesting.
    pub(in crate::quant) fn parse(file: &str, bytes: &[u8]) -> Result<Json, QuantError> {
        let len_bytes = bytes.len() as u64;
        if len_bytes > CONFIG_LEN_BYTES_MAX {
            let file = file.to_owned();
            return Err(QuantError::ConfigTooLong { file, len_bytes, len_bytes_max: CONFIG_LEN_BYTES_MAX });
        }
        let bad = |at_bytes, message| QuantError::ConfigJson { file: file.to_owned(), at_bytes, message };
        let text = std::str::from_utf8(bytes)
            .map_err(|error| bad(error.valid_up_to() as u64, "not UTF-8".to_owned()))?;
        serde_json::from_str(text).map_err(|error| bad(error_at(text, &error), error_text(&error)))
    }

    pub(in crate::quant) fn as_map(&self) -> Option<&Map> {
        match self {
            Json::Map(map) => Some(map),
            _ => None,
        }
    }

    pub(in crate::quant) fn as_list(&self) -> Option<&[Json]> {
        match self {
            Json::List(list) => Some(list),
            _ => None,
        }
    }

    pub(in crate::quant) fn as_text(&self) -> Option<&str> {
        match self {
            Json::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(in crate::quant) fn as_flag(&self) -> Option<bool> {
        match self {
            Json::Flag(flag) => Some(*flag),
            _ => None,
        }
    }

    /// Returns a whole number, also one that is written as `4.0`.
    pub(in crate::quant) fn as_whole(&self) -> Option<i64> {
        match self {
            Json::Whole(number) => Some(*number),
            // Saturates, and then differs.
            Json::Real(number) => Some(*number as i64).filter(|whole| *whole as f64 == *number),
            _ => None,
        }
    }

    pub(in crate::quant) fn as_real(&self) -> Option<f64> {
        match self {
            Json::Whole(number) => Some(*number as f64),
            Json::Real(number) => Some(*number),
            _ => None,
        }
    }

    /// Returns the value of a key, `None` where this is no object, lacks it, or it is null.
    pub(in crate::quant) fn get(&self, key: &str) -> Option<&Json> {
        get(self.as_map()?, key)
    }
}

/// Returns the value of a key, `None` where it is absent or null.
pub(in crate::quant) fn get<'j>(map: &'j Map, key: &str) -> Option<&'j Json> {
    map.iter()
        .rev()
        .find(|(name, _)| name == key)
        .map(|(_, value)| value)
        .filter(|value| **value != Json::Null)
}

impl fmt::Display for Json {
    /// Prints leaves as they are, the rest by kind and length.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Json::Null => f.write_str("null"),
            Json::Flag(flag) => write!(f, "{flag}"),
            Json::Whole(number) => write!(f, "{number}"),
            Json::Real(number) => write!(f, "{number}"),
            Json::Text(text) => write!(f, "{text:?}"),
            Json::List(list) => write!(f, "a list of {}", list.len()),
            Json::Map(map) => write!(f, "an object of {} keys", map.len()),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Json, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Json, E> {
        Ok(Json::Flag(flag))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Json, E> {
        Ok(Json::Whole(number))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Json, E> {
        Ok(i64::try_from(number).map_or(Json::Real(number as f64), Json::Whole))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Json, E> {
        Ok(Json::Real(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Json, E> {
        Ok(Json::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = seq.next_element()? {
            list.push(value);
        }
        Ok(Json::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Json, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Json::Map(map))
    }
}

/// The longest configuration accepted. Real ones with a line for each of 50,000 modules stay below 10 MB.
pub(in crate::quant) const CONFIG_LEN_BYTES_MAX: u64 = 64 << 20;
