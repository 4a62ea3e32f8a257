//! The result of a load: tensors by name, and the report.

use std::collections::HashMap;
use std::sync::Arc;

use tensorhaul_plan::{Checkpoint, TensorId};

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

/// Tensors by name, in the order of the checkpoint's files and their bytes.
#[derive(Clone, Debug)]
pub struct Tensors {
    checkpoint: Arc<Checkpoint>,
    /// Ascending by id; at one id, the stored tensor first.
    entries: Vec<Entry>,
    /// Those that were made, by name.
    made: HashMap<Arc<str>, usize>,
}

/// A tensor and what it is called.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    id: TensorId,
    /// Of one that was made; a stored one's name is the checkpoint's.
    name: Option<Arc<str>>,
    tensor: Tensor,
}

impl Entry {
    pub(crate) fn new(ready: Ready<'_>) -> Entry {
        Entry { id: ready.id, name: ready.is_made.then(|| ready.name.into()), tensor: ready.tensor }
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
        entries.sort_by_key(|entry| (entry.id, entry.name.is_some()));
        let named =
            entries.iter().enumerate().filter_map(|(index, entry)| Some((entry.name.clone()?, index)));
        let made = named.collect();
        Tensors { checkpoint, entries, made }
    }

    /// Returns the tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        if let Some(index) = self.made.get(name) {
            return Some(&self.entries[*index].tensor);
        }
        let id = self.checkpoint.find(name)?.id;
        let index = self.entries.partition_point(|entry| entry.id < id);
        let entry = self.entries.get(index).filter(|entry| entry.id == id && entry.name.is_none())?;
        Some(&entry.tensor)
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
