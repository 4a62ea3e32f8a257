//! The result of a load: tensors by name, and the report.

use std::collections::HashMap;
use std::sync::Arc;

use tensorhaul_plan::{Checkpoint, DeviceId, TensorId};

use crate::handover::Ready;
use crate::report::Report;
use crate::tensor::Tensor;

/// Tensors by name, and the report of how they came.
#[derive(Debug)]
pub struct Loaded {
    /// The tensors.
    pub tensors: Tensors,
    /// What the load did.
    pub report: Report,
}

/// Tensors by name, in the order of the checkpoint's files and their bytes. One that a device map sends to several devices is there
/// once for each.
#[derive(Clone, Debug)]
pub struct Tensors {
    checkpoint: Arc<Checkpoint>,
    /// Ascending by id, name and device; at one id, the stored tensor first.
    entries: Vec<Entry>,
    /// Those with names of their own, by name; of each by device.
    renamed: HashMap<Arc<str>, Vec<usize>>,
}

/// A tensor and what it is called.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    id: TensorId,
    /// Of one that was made or put together; a stored one's name is the checkpoint's.
    name: Option<Arc<str>>,
    tensor: Tensor,
}

impl Entry {
    pub(crate) fn new(ready: Ready<'_>) -> Entry {
        Entry { id: ready.id, name: ready.is_renamed.then(|| ready.name.into()), tensor: ready.tensor }
    }

    fn key(&self) -> (TensorId, &Option<Arc<str>>, DeviceId) {
        (self.id, &self.name, self.tensor.device())
    }

    fn name<'e>(&'e self, checkpoint: &'e Checkpoint) -> &'e str {
        match &self.name {
            Some(name) => name,
            None => checkpoint.tensor(self.id).info.name,
        }
    }
}

impl Tensors {
    pub(crate) fn new(checkpoint: Arc<Checkpoint>, mut entries: Vec<Entry>) -> Tensors {
        entries.sort_by(|a, b| a.key().cmp(&b.key()));
        let mut renamed: HashMap<Arc<str>, Vec<usize>> = HashMap::new();
        for (index, entry) in entries.iter().enumerate() {
            if let Some(name) = &entry.name {
                renamed.entry(name.clone()).or_default().push(index);
            }
        }
        renamed.values_mut().for_each(|places| places.sort_by_key(|place| entries[*place].tensor.device()));
        Tensors { checkpoint, entries, renamed }
    }

    /// Returns the tensor of this name; of several, that on the first device (the host, then by ordinal).
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.all(name).next()
    }

    /// Returns the tensor of this name on a device.
    pub fn get_on(&self, name: &str, device: DeviceId) -> Option<&Tensor> {
        self.all(name).find(|tensor| tensor.device() == device)
    }

    /// Walks the tensors of this name, one for each device that it is on, ascending.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &Tensor> {
        let renamed = self.renamed.get(name).map_or(&[][..], Vec::as_slice);
        let id = self.checkpoint.find(name).filter(|_| renamed.is_empty()).map(|stored| stored.id);
        let first = id.map_or(self.entries.len(), |id| self.entries.partition_point(|entry| entry.id < id));
        let stored = self.entries[first..].iter().take_while(move |entry| Some(entry.id) == id);
        let renamed = renamed.iter().map(|place| &self.entries[*place]);
        renamed.chain(stored.filter(|entry| entry.name.is_none())).map(|entry| &entry.tensor)
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Tells whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Walks names and tensors.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.entries.iter().map(|entry| (entry.name(&self.checkpoint), &entry.tensor))
    }
}

impl IntoIterator for Tensors {
    type Item = (String, Tensor);
    type IntoIter = IntoIter;

    fn into_iter(self) -> IntoIter {
        IntoIter { checkpoint: self.checkpoint, entries: self.entries.into_iter() }
    }
}

/// Names and tensors, moved out of [`Tensors`]. Tensors not yet taken are dropped with it.
#[derive(Debug)]
pub struct IntoIter {
    checkpoint: Arc<Checkpoint>,
    entries: std::vec::IntoIter<Entry>,
}

impl Iterator for IntoIter {
    type Item = (String, Tensor);

    fn next(&mut self) -> Option<(String, Tensor)> {
        let entry = self.entries.next()?;
        Some((entry.name(&self.checkpoint).to_owned(), entry.tensor))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.entries.size_hint()
    }
}

impl ExactSizeIterator for IntoIter {}
