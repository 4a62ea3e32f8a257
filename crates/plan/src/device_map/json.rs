//! Device maps as JSON: `{"model.layers.0": 0, "lm_head": ["cuda:0", "cuda:1"]}`.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::{DeviceMap, DeviceMapError};
use crate::header::json::{error_at, error_text};
use crate::placement::DeviceId;

impl DeviceMap {
    /// Reads the JSON of a device map. Ordinals alone are of the vendor of `default`. `cpu` and `host` are the host, `cuda` and `rocm` alone their
    /// first device.
    ///
    /// # Errors
    /// [`DeviceMapError::NotJson`] with the place; [`DeviceMapError::UnknownDevice`], [`DeviceMapError::WhoseOrdinal`] and
    /// [`DeviceMapError::OnDisk`] for what names no device; else those of [`DeviceMap::new`].
    pub fn from_json(json: &[u8], default: DeviceId) -> Result<DeviceMap, DeviceMapError> {
        let text = std::str::from_utf8(json).map_err(|error| DeviceMapError::NotJson {
            at_bytes: error.valid_up_to() as u64,
            what: "not UTF-8".to_owned(),
        })?;
        let (mut entries, mut failure) = (Vec::new(), None);
        let mut json = serde_json::Deserializer::from_str(text);
        let seed = Entries { default, entries: &mut entries, failure: &mut failure };
        let parsed = json.deserialize_map(seed).and_then(|()| json.end());
        match (failure, parsed) {
            (Some(failure), _) => Err(failure),
            (None, Ok(())) => DeviceMap::new(entries),
            (None, Err(error)) => {
                Err(DeviceMapError::NotJson { at_bytes: error_at(text, &error), what: error_text(&error) })
            }
        }
    }
}

impl Serialize for DeviceMap {
    /// Writes what [`DeviceMap::from_json`] reads.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.entries().len()))?;
        for (pattern, devices) in self.entries() {
            match devices {
                [device] => map.serialize_entry(pattern, device)?,
                devices => map.serialize_entry(pattern, devices)?,
            }
        }
        map.end()
    }
}

type Listed = Vec<(String, Vec<DeviceId>)>;

/// Reads entries in their order, also such as repeat, until one fails.
struct Entries<'e> {
    default: DeviceId,
    entries: &'e mut Listed,
    failure: &'e mut Option<DeviceMapError>,
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("names or patterns of tensors, each with a device or a list of devices")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(pattern) = map.next_key::<String>()? {
            match map.next_value_seed(Value { pattern: &pattern, default: self.default, is_listed: false })? {
                Ok(devices) => self.entries.push((pattern, devices)),
                Err(failure) => {
                    *self.failure = Some(failure);
                    return Err(A::Error::custom("a device that is none"));
                }
            }
        }
        Ok(())
    }
}

/// Reads the devices of one entry.
#[derive(Clone, Copy)]
struct Value<'p> {
    pattern: &'p str,
    default: DeviceId,
    /// Whether it is a device of a list, which holds no further lists.
    is_listed: bool,
}

type Devices = Result<Vec<DeviceId>, DeviceMapError>;

impl Value<'_> {
    fn named(&self, text: &str) -> Devices {
        let pattern = || self.pattern.to_owned();
        match text {
            "disk" => Err(DeviceMapError::OnDisk { pattern: pattern() }),
            _ => match text.parse() {
                Ok(device) => Ok(vec![device]),
                Err(_) => Err(DeviceMapError::UnknownDevice { pattern: pattern(), text: text.to_owned() }),
            },
        }
    }

    fn numbered(&self, number: u64) -> Devices {
        let ordinal = u32::try_from(number).ok();
        let device = ordinal.and_then(|ordinal| match self.default {
            DeviceId::Host => None,
            DeviceId::Cuda(_) => Some(DeviceId::Cuda(ordinal)),
            DeviceId::Rocm(_) => Some(DeviceId::Rocm(ordinal)),
        });
        let none = || DeviceMapError::WhoseOrdinal { pattern: self.pattern.to_owned(), ordinal: number };
        device.map(|device| vec![device]).ok_or_else(none)
    }
}

impl<'de> DeserializeSeed<'de> for Value<'_> {
    type Value = Devices;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Devices, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value<'_> {
    type Value = Devices;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_listed { "a device" } else { "a device or a list of devices" })
    }

    fn visit_str<E>(self, text: &str) -> Result<Devices, E> {
        Ok(self.named(text))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Devices, E> {
        Ok(self.numbered(number))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Devices, A::Error> {
        if self.is_listed {
            return Err(A::Error::custom("a list in a list of devices"));
        }
        let mut listed = Vec::new();
        while let Some(devices) = seq.next_element_seed(Value { is_listed: true, ..self })? {
            match devices {
                Ok(devices) => listed.extend(devices),
                Err(failure) => {
                    // A list that is left half read is an error of its own, which would be told instead.
                    while seq.next_element::<IgnoredAny>()?.is_some() {}
                    return Ok(Err(failure));
                }
            }
        }
        Ok(Ok(listed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<DeviceMap, DeviceMapError> {
        DeviceMap::from_json(json.as_bytes(), DeviceId::Cuda(0))
    }

    #[test]
    fn devices_are_ordinals_names_and_lists() {
        let map =
            read(r#"{"a": 1, "b": "cpu", "c": ["cuda:0", 2, "host"], "d": "rocm", "": "cuda"}"#).unwrap();
        let listed: Vec<_> = map.entries().map(|(pattern, devices)| (pattern, devices.to_vec())).collect();
        let (host, cuda) = (DeviceId::Host, DeviceId::Cuda);
        assert_eq!(
            listed,
            [
                ("a", vec![cuda(1)]),
                ("b", vec![host]),
                ("c", vec![cuda(0), cuda(2), host]),
                ("d", vec![DeviceId::Rocm(0)]),
                ("", vec![cuda(0)]),
            ]
        );
        let written = serde_json::to_string(&map).unwrap();
        assert_eq!(
            written,
            r#"{"a":"cuda:1","b":"host","c":["cuda:0","cuda:2","host"],"d":"rocm:0","":"cuda:0"}"#
        );
        assert_eq!(serde_json::to_string(&read(&written).unwrap()).unwrap(), written);
    }

    #[test]
    fn ordinals_are_of_the_default_vendor_or_nobodys() {
        let map = DeviceMap::from_json(br#"{"a": 3}"#, DeviceId::Rocm(7)).unwrap();
        assert_eq!(map.devices(), [DeviceId::Rocm(3)]);
        let error = DeviceMap::from_json(br#"{"a": 3}"#, DeviceId::Host).unwrap_err();
        assert_eq!(error.to_string(), "device map entry \"a\": 3 is no vendor's; write cuda:3 or rocm:3");
        let json = br#"{"model.layers": [0, 1], "": "cpu"}"#;
        let error = DeviceMap::from_json(json, DeviceId::Host).unwrap_err();
        assert!(
            error.to_string().starts_with("device map entry \"model.layers\": 0 is no vendor's"),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_map_says_what_and_where() {
        let text = |json| read(json).unwrap_err().to_string();
        assert_eq!(
            text(r#"{"a": "tpu:0"}"#),
            "device map entry \"a\": \"tpu:0\" names no device; cpu, host, cuda:0, rocm:0 and ordinals do"
        );
        assert_eq!(
            text(r#"{"a": ["cpu", "disk"]}"#),
            "device map entry \"a\": a load leaves nothing on disk; map it to cpu, or do not select it"
        );
        for json in
            [r#"{"a": ["tpu", 0, "cpu"], "b": 0}"#, r#"{"a": [0, "tpu", [1]]}"#, r#"{"a": [0, "tpu"]}"#]
        {
            assert!(text(json).starts_with("device map entry \"a\": \"tpu\" names no device"), "{json}");
        }
        assert_eq!(text(r#"{"a": 0, "a": 1}"#), "device map entry \"a\" is there twice");
        assert_eq!(text(r#"{"a": []}"#), "device map entry \"a\" names no device");
        assert_eq!(text(r#"{"a": ["cpu", "host"]}"#), "device map entry \"a\" names host twice");
        assert!(
            text(r#"{"a": -1}"#)
                .starts_with("not a device map: invalid type: integer `-1`, expected a device")
        );
        assert!(text(r#"{"a": [[0]]}"#).contains("a list in a list of devices"));
        assert!(text(r#"["cuda:0"]"#).contains("expected names or patterns of tensors"));
        assert!(text(r#"{"a": 0} x"#).starts_with("not a device map: trailing characters (byte 9"));
        assert_eq!(
            text("{}"),
            "a device map without entries places nothing; \"\" is the entry for everything"
        );
    }
}
