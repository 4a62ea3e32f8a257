//! Which tensor goes to which devices, by name.

mod auto;
mod error;
mod json;

use std::collections::HashMap;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::placement::DeviceId;

pub use auto::AUTO_RESERVE_ONE_IN;
pub use error::DeviceMapError;

/// Which tensor goes to which devices, by name: the device map of Hugging Face's libraries, with globs and lists of devices besides.
///
/// An entry is a tensor's whole name, a module's (`model.layers.0`, which means everything below it), a glob (`*.experts.*`), or the empty text,
/// which means everything. The most specific decides: the whole name, else the longest module, else the first glob that matches, else the
/// entry for everything. An entry may name several devices, which all get the tensor.
///
/// # Example
/// ```
/// use tensorhaul_plan::{DeviceId, DeviceMap};
///
/// let json = br#"{"model.embed_tokens": "cuda:0", "model.layers.0": 0, "model.norm": ["cuda:0", "cuda:1"], "lm_head": "cpu"}"#;
/// let map = DeviceMap::from_json(json, DeviceId::Cuda(0))?;
/// assert_eq!(map.devices_of("model.layers.0.mlp.up_proj.weight"), Some(&[DeviceId::Cuda(0)][..]));
/// assert_eq!(map.devices_of("model.norm.weight").unwrap().len(), 2);
/// assert_eq!(map.devices_of("model.layers.1.mlp.up_proj.weight"), None);
/// # Ok::<(), tensorhaul_plan::DeviceMapError>(())
/// ```
///
/// # Source
/// Accelerate, "Handling big models for inference", section "Designing a device map": keys are names of modules or tensors, values are ordinals
/// or names of devices.
#[derive(Clone, Debug)]
pub struct DeviceMap {
    entries: Vec<Entry>,
    /// Entries that are no globs, by their text.
    literal: HashMap<String, usize>,
    globs: GlobSet,
    /// The entry of each glob of the set.
    of_glob: Vec<usize>,
}

/// What decides for some tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    pattern: String,
    devices: Vec<DeviceId>,
}

impl DeviceMap {
    /// Makes a map of patterns and their devices; see [`DeviceMap`] for what a pattern is and which one decides.
    ///
    /// # Errors
    /// [`DeviceMapError`] when there is no entry, one names no device or a device twice, two have the same pattern, or one is no glob.
    pub fn new(
        entries: impl IntoIterator<Item = (String, Vec<DeviceId>)>,
    ) -> Result<DeviceMap, DeviceMapError> {
        let entries: Vec<_> =
            entries.into_iter().map(|(pattern, devices)| Entry { pattern, devices }).collect();
        if entries.is_empty() {
            return Err(DeviceMapError::Empty);
        }
        let (mut literal, mut globs, mut of_glob) = (HashMap::new(), GlobSetBuilder::new(), Vec::new());
        for (index, Entry { pattern, devices }) in entries.iter().enumerate() {
            check_devices(pattern, devices)?;
            if literal.insert(pattern.clone(), index).is_some() {
                return Err(DeviceMapError::RepeatedPattern { pattern: pattern.clone() });
            }
            if is_glob(pattern) {
                let glob = GlobBuilder::new(pattern).literal_separator(false).backslash_escape(true).build();
                globs.add(glob.map_err(|error| bad_glob(pattern, &error))?);
                of_glob.push(index);
            }
        }
        let globs = globs.build().map_err(|error| bad_glob(error.glob().unwrap_or_default(), &error))?;
        Ok(DeviceMap { entries, literal, globs, of_glob })
    }

    /// Sends everything to the same devices.
    ///
    /// # Errors
    /// [`DeviceMapError`] when there is no device, or one twice.
    pub fn everything_on(devices: Vec<DeviceId>) -> Result<DeviceMap, DeviceMapError> {
        DeviceMap::new([(String::new(), devices)])
    }

    /// Returns the devices that get a tensor, in the order of its entry; `None` when no entry is about it.
    pub fn devices_of(&self, name: &str) -> Option<&[DeviceId]> {
        self.entry_of(name).map(|entry| &*self.entries[entry].devices)
    }

    /// Returns every device that an entry names, ascending.
    pub fn devices(&self) -> Vec<DeviceId> {
        let mut devices: Vec<_> = self.entries.iter().flat_map(|entry| &entry.devices).copied().collect();
        devices.sort_unstable();
        devices.dedup();
        devices
    }

    /// Walks the patterns and their devices, in the order they were given in.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (&str, &[DeviceId])> {
        self.entries.iter().map(|entry| (&*entry.pattern, &*entry.devices))
    }

    /// Checks that each entry is about a tensor of a checkpoint, even where another decides for it, and that each tensor to be
    /// loaded has an entry.
    ///
    /// # Errors
    /// [`DeviceMapError::NothingMatches`] and [`DeviceMapError::NotMapped`].
    pub fn check<'n>(
        &self,
        known: impl IntoIterator<Item = &'n str>,
        loaded: impl IntoIterator<Item = &'n str>,
    ) -> Result<(), DeviceMapError> {
        let (mut is_matched, mut tensor_count) = (vec![false; self.entries.len()], 0);
        for name in known {
            tensor_count += 1;
            self.literals_of(name).for_each(|entry| is_matched[entry] = true);
            self.globs.matches(name).into_iter().for_each(|glob| is_matched[self.of_glob[glob]] = true);
        }
        let everything = self.literal.get("").copied();
        let is_about_nothing = |(entry, matched): (usize, &bool)| !matched && everything != Some(entry);
        if let Some(entry) = is_matched.iter().enumerate().position(is_about_nothing) {
            let pattern = self.entries[entry].pattern.clone();
            return Err(DeviceMapError::NothingMatches { pattern, tensor_count });
        }
        let mut missing = loaded.into_iter().filter(|name| self.entry_of(name).is_none());
        let mut names: Vec<_> = missing.by_ref().take(NAMES_TOLD_MAX).map(str::to_owned).collect();
        if names.is_empty() {
            return Ok(());
        }
        names.sort_unstable();
        let count = names.len() + missing.count();
        Err(DeviceMapError::NotMapped { names, count })
    }

    fn entry_of(&self, name: &str) -> Option<usize> {
        let glob = || self.globs.matches(name).into_iter().map(|glob| self.of_glob[glob]).min();
        self.literals_of(name).next().or_else(glob).or_else(|| self.literal.get("").copied())
    }

    /// Walks the entries that are the name or a module around it, the most specific first.
    fn literals_of<'m>(&'m self, name: &'m str) -> impl Iterator<Item = usize> + 'm {
        let modules =
            name.rmatch_indices('.').map(|(dot, _)| &name[..dot]).filter(|module| !module.is_empty());
        std::iter::once(name).chain(modules).filter_map(|module| self.literal.get(module).copied())
    }
}

fn check_devices(pattern: &str, devices: &[DeviceId]) -> Result<(), DeviceMapError> {
    if devices.is_empty() {
        return Err(DeviceMapError::NoDevice { pattern: pattern.to_owned() });
    }
    let is_twice = |(at, device): (usize, &&DeviceId)| devices[..at].contains(device);
    match devices.iter().enumerate().find(|(at, device)| is_twice((*at, device))) {
        Some((_, device)) => {
            Err(DeviceMapError::DeviceTwice { pattern: pattern.to_owned(), device: *device })
        }
        None => Ok(()),
    }
}

fn is_glob(pattern: &str) -> bool {
    pattern.contains(['*', '?', '[', '{'])
}

fn bad_glob(pattern: &str, error: &globset::Error) -> DeviceMapError {
    DeviceMapError::BadGlob { pattern: pattern.to_owned(), what: error.kind().to_string() }
}

/// Enough to see which ones are missing, few enough for a line.
pub(crate) const NAMES_TOLD_MAX: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    const A: DeviceId = DeviceId::Cuda(0);
    const B: DeviceId = DeviceId::Cuda(1);

    fn map(entries: &[(&str, &[DeviceId])]) -> Result<DeviceMap, DeviceMapError> {
        DeviceMap::new(entries.iter().map(|(pattern, devices)| ((*pattern).to_owned(), devices.to_vec())))
    }

    #[test]
    fn the_most_specific_entry_decides() {
        let map = map(&[
            ("*.bias", &[B, A]),
            ("*", &[A, B]),
            ("", &[DeviceId::Host]),
            ("model", &[B]),
            ("model.layers.1", &[A]),
            ("model.layers.1.w", &[B, DeviceId::Host]),
        ])
        .unwrap();
        let devices = |name| map.devices_of(name).unwrap();
        assert_eq!(devices("model.layers.1.w"), [B, DeviceId::Host], "the whole name");
        assert_eq!(devices("model.layers.1.v"), [A], "the longest module");
        assert_eq!(devices("model.layers.10.w"), [B], "a module ends at a dot");
        assert_eq!(devices("model.layers.1.bias"), [A], "a module before a glob");
        assert_eq!(devices("other.bias"), [B, A], "the first glob");
        assert_eq!(devices("other"), [A, B], "any glob before everything");
        assert_eq!(map.devices(), [DeviceId::Host, A, B]);
    }

    #[test]
    fn the_empty_pattern_is_everything_and_nothing_else_is_left() {
        let everything = DeviceMap::everything_on(vec![B]).unwrap();
        assert_eq!(everything.devices_of("a"), Some(&[B][..]));
        assert_eq!(everything.devices_of(""), Some(&[B][..]));
        assert_eq!(map(&[("a", &[A])]).unwrap().devices_of("b"), None);
        assert_eq!(map(&[("a", &[A])]).unwrap().devices_of("ab"), None);
        assert_eq!(everything.check(["x", "y"], ["x"]), Ok(()));
        assert_eq!(everything.check([], []), Ok(()));
    }

    #[test]
    fn a_name_that_looks_like_a_glob_is_found_by_its_whole_name() {
        let map = map(&[("w[0]", &[A]), ("", &[B])]).unwrap();
        assert_eq!(map.devices_of("w[0]"), Some(&[A][..]));
        assert_eq!(map.devices_of("w0"), Some(&[A][..]));
        assert_eq!(map.devices_of("w1"), Some(&[B][..]));
    }

    #[test]
    fn what_cannot_be_a_map_says_why() {
        let text = |entries: &[(&str, &[DeviceId])]| map(entries).unwrap_err().to_string();
        assert_eq!(
            text(&[]),
            "a device map without entries places nothing; \"\" is the entry for everything"
        );
        assert_eq!(text(&[("a", &[])]), "device map entry \"a\" names no device");
        assert_eq!(text(&[("a", &[A, B, A])]), "device map entry \"a\" names cuda:0 twice");
        assert_eq!(text(&[("a", &[A]), ("a", &[B])]), "device map entry \"a\" is there twice");
        assert!(text(&[("a[", &[A])]).starts_with("device map entry \"a[\" is not a glob: "));
    }

    #[test]
    fn entries_about_nothing_and_tensors_without_an_entry_are_told() {
        let names: Vec<String> = (0..30).map(|number| format!("t{number:02}")).collect();
        let names = || names.iter().map(String::as_str);
        let text = |map: DeviceMap| map.check(names(), names()).unwrap_err().to_string();
        assert_eq!(
            text(map(&[("", &[A]), ("u", &[A])]).unwrap()),
            "device map entry \"u\" is about none of the 30 tensors"
        );
        assert_eq!(
            text(map(&[("t0?", &[A]), ("x*", &[A])]).unwrap()),
            "device map entry \"x*\" is about none of the 30 tensors"
        );
        let missing = text(map(&[("t0?", &[A])]).unwrap());
        assert!(
            missing.starts_with("no entry of the device map is about 20 tensors: t10, t11, "),
            "{missing}"
        );
        let missing = text(map(&[("t00", &[A])]).unwrap());
        assert!(missing.contains("about 29 tensors: t01, ") && missing.ends_with("t20, ..."), "{missing}");
        // One that another entry is more specific than is still about something.
        assert_eq!(map(&[("t*", &[A]), ("t00", &[B])]).unwrap().check(names(), names()), Ok(()));
    }
}
