//! One object of a configuration, read key by key with errors that name the key.

use super::json::{Json, Map, get};
use crate::quant::QuantError;

/// An object of a configuration, and where it is.
#[derive(Clone, Debug)]
pub(in crate::quant) struct Section<'j> {
    pub(in crate::quant) file: &'j str,
    /// The keys down to this object, joined with dots; empty at the top.
    pub(in crate::quant) path: String,
    pub(in crate::quant) map: &'j Map,
}

impl<'j> Section<'j> {
    /// Returns the value of the first of these synonyms that is there and not null.
    pub(in crate::quant) fn get(&self, keys: &[&'static str]) -> Option<(&'static str, &'j Json)> {
        keys.iter().find_map(|key| Some((*key, get(self.map, key)?)))
    }

    pub(in crate::quant) fn has(&self, key: &'static str) -> bool {
        get(self.map, key).is_some()
    }

    pub(in crate::quant) fn flag(&self, keys: &[&'static str]) -> Result<Option<bool>, QuantError> {
        self.read(keys, "true or false", Json::as_flag)
    }

    pub(in crate::quant) fn text(&self, keys: &[&'static str]) -> Result<Option<&'j str>, QuantError> {
        self.read(keys, "a text", Json::as_text)
    }

    /// Returns the object at a key.
    pub(in crate::quant) fn section(&self, key: &'static str) -> Result<Option<Section<'j>>, QuantError> {
        let map = self.read(&[key], "an object", Json::as_map)?;
        Ok(map.map(|map| Section { file: self.file, path: self.key(key), map }))
    }

    /// Returns the texts of a list, none where the key is absent or null.
    pub(in crate::quant) fn texts(&self, keys: &[&'static str]) -> Result<Vec<&'j str>, QuantError> {
        let list = |value: &'j Json| value.as_list()?.iter().map(Json::as_text).collect();
        Ok(self.read(keys, "a list of texts", list)?.unwrap_or_default())
    }

    /// Returns the bits of a code.
    pub(in crate::quant) fn bits(&self, keys: &[&'static str]) -> Result<Option<u8>, QuantError> {
        let bits = |value: &Json| value.as_whole().and_then(|bits| u8::try_from(bits).ok());
        self.read(keys, "a whole number of bits", bits)
    }

    /// Returns a group size; all columns for -1 and 0.
    pub(in crate::quant) fn group_size(
        &self,
        keys: &[&'static str],
    ) -> Result<Option<GroupSize>, QuantError> {
        let size = |value: &Json| match value.as_whole()? {
            -1 | 0 => Some(GroupSize::AllColumns),
            size => u32::try_from(size).ok().map(GroupSize::Columns),
        };
        self.read(keys, "a number of columns, or -1 for all,", size)
    }

    /// Returns the rows and columns of a block, written as a list of two.
    pub(in crate::quant) fn block(&self, keys: &[&'static str]) -> Result<Option<[u32; 2]>, QuantError> {
        let side = |value: &Json| {
            value.as_whole().and_then(|side| u32::try_from(side).ok()).filter(|side| *side > 0)
        };
        let block = |value: &Json| match value {
            // compressed-tensors also writes "128x128".
            Json::Text(text) => {
                let (rows, cols) = text.split_once('x')?;
                let side = |text: &str| text.trim().parse::<u32>().ok().filter(|side| *side > 0);
                Some([side(rows)?, side(cols)?])
            }
            _ => match value.as_list()? {
                [rows, cols] => Some([side(rows)?, side(cols)?]),
                _ => None,
            },
        };
        self.read(keys, "two positive numbers, rows and columns of a block,", block)
    }

    /// Returns the full name of a key.
    pub(in crate::quant) fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub(in crate::quant) fn error(&self, key: &str, found: &Json, expected: &str) -> QuantError {
        QuantError::ConfigValue {
            file: self.file.to_owned(),
            key: self.key(key),
            found: found.to_string(),
            expected: expected.to_owned(),
        }
    }

    fn read<T>(
        &self,
        keys: &[&'static str],
        expected: &str,
        convert: impl Fn(&'j Json) -> Option<T>,
    ) -> Result<Option<T>, QuantError> {
        let Some((key, value)) = self.get(keys) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(key, value, expected))
    }
}

/// Columns that share a scale, as configurations say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::quant) enum GroupSize {
    AllColumns,
    Columns(u32),
}
