//! What the JSON readers of this crate share: error positions, and values nobody asked for.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// Returns the offset in `json` at which `serde_json` stopped, at most `json.len()`.
pub(crate) fn error_at(json: &str, error: &serde_json::Error) -> u64 {
    let lines_before: usize =
        json.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    let at = lines_before + error.column().saturating_sub(1);
    at.min(json.len()) as u64
}

/// Returns the text of a `serde_json` error without its position, shortened to
/// [`MESSAGE_LEN_CHARS_MAX`].
pub(crate) fn error_text(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    let text = text.strip_suffix(&position).unwrap_or(&text);
    match text.char_indices().nth(MESSAGE_LEN_CHARS_MAX) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text.to_owned(),
    }
}

/// A name from a file, quoted and escaped, shortened to what a line of a terminal bears.
pub(crate) struct Quoted<'a>(pub(crate) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(QUOTED_LEN_CHARS_MAX) {
            Some((cut, _)) => write!(f, "{:?}... ({} bytes)", &self.0[..cut], self.0.len()),
            None => write!(f, "{:?}", self.0),
        }
    }
}

/// Any JSON value, checked as if it were kept; only a whole number is.
///
/// `serde::de::IgnoredAny` is more lenient: `serde_json` then lets numbers beyond `f64`, lone surrogates and
/// any depth of nesting pass, all of which the reference refuses because it buffers each entry.
pub(crate) struct Any {
    /// The number, if it is a whole one from 0 to `u64::MAX`, also when written as `1e3`.
    pub(crate) whole: Option<u64>,
}

const OTHER: Any = Any { whole: None };

impl<'de> Deserialize<'de> for Any {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Any, D::Error> {
        deserializer.deserialize_any(OTHER)
    }
}

impl<'de> Visitor<'de> for Any {
    type Value = Any;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_u64<E>(self, number: u64) -> Result<Any, E> {
        Ok(Any { whole: Some(number) })
    }

    fn visit_f64<E>(self, number: f64) -> Result<Any, E> {
        // Saturates: a fraction, a negative number or one beyond `u64` doesn't survive the way back.
        let whole = number as u64;
        Ok(Any { whole: (whole as f64 == number && whole < u64::MAX).then_some(whole) })
    }

    fn visit_i64<E>(self, _: i64) -> Result<Any, E> {
        Ok(OTHER)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Any, E> {
        Ok(OTHER)
    }

    fn visit_str<E>(self, _: &str) -> Result<Any, E> {
        Ok(OTHER)
    }

    fn visit_unit<E>(self) -> Result<Any, E> {
        Ok(OTHER)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Any, A::Error> {
        while let Some(Any { .. }) = seq.next_element()? {}
        Ok(OTHER)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Any, A::Error> {
        while let Some((Any { .. }, Any { .. })) = map.next_entry()? {}
        Ok(OTHER)
    }
}

const MESSAGE_LEN_CHARS_MAX: usize = 300;
const QUOTED_LEN_CHARS_MAX: usize = 200;
