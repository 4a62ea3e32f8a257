//! The result of a load: tensors by name, and the report.

use std::sync::Arc;

use tensorhaul_plan::{Checkpoint, TensorId};

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
    /// Ascending by id.
    tensors: Vec<(TensorId, Tensor)>,
}

impl Tensors {
    /// `tensors` must be ascending by id.
    pub(crate) fn new(checkpoint: Arc<Checkpoint>, tensors: Vec<(TensorId, Tensor)>) -> Tensors {
        debug_assert!(tensors.is_sorted_by_key(|(id, _)| *id));
        Tensors { checkpoint, tensors }
    }

    /// Returns the tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        let id = self.checkpoint.find(name)?.id;
        let index = self.tensors.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        Some(&self.tensors[index].1)
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Tells whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Walks names and tensors.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(id, tensor)| (self.checkpoint.tensor(*id).info.name, tensor))
    }
}

impl IntoIterator for Tensors {
    type Item = (String, Tensor);
    type IntoIter = IntoIter;

    fn into_iter(self) -> IntoIter {
        IntoIter { checkpoint: self.checkpoint, tensors: self.tensors.into_iter() }
    }
}

/// Names and tensors, moved out of [`Tensors`]. Tensors not yet taken are dropped with it.
#[derive(Debug)]
pub struct IntoIter {
    checkpoint: Arc<Checkpoint>,
    tensors: std::vec::IntoIter<(TensorId, Tensor)>,
}

impl Iterator for IntoIter {
    type Item = (String, Tensor);

    fn next(&mut self) -> Option<(String, Tensor)> {
        let (id, tensor) = self.tensors.next()?;
        Some((self.checkpoint.tensor(id).info.name.to_owned(), tensor))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.tensors.size_hint()
    }
}

impl ExactSizeIterator for IntoIter {}
