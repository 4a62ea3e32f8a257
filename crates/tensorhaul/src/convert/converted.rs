//! The bytes of tensors that are copied as they are, or cast, on their way.

use std::cell::RefCell;

use tensorhaul_plan::{Dtype, TensorInfo};

use super::Overflowed;
use crate::cast::cast;
use crate::error::Result;
use crate::model::Model;
use crate::save::TensorBytes;
use crate::tensor::Tensor;

/// The bytes of one tensor of the result.
pub(super) struct Converted<'m> {
    pub(super) model: &'m Model,
    pub(super) info: TensorInfo<'m>,
    pub(super) dtype: Dtype,
    /// The source, from the first piece on.
    pub(super) tensor: Option<Tensor>,
    pub(super) overflowed: &'m RefCell<Vec<Overflowed>>,
}

impl TensorBytes for Converted<'_> {
    fn len_bytes(&self) -> u64 {
        match self.info.len_bytes() {
            unchanged if self.dtype == self.info.dtype => unchanged,
            cast => cast / (self.info.dtype.bits() / 8) * (self.dtype.bits() / 8),
        }
    }

    fn fill(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<()> {
        let tensor = match &mut self.tensor {
            Some(tensor) => tensor,
            none => none.insert(self.model.tensor(self.info.name)?),
        };
        let source = tensor.bytes()?;
        if self.dtype == self.info.dtype {
            let begin = offset_bytes as usize;
            target.copy_from_slice(&source[begin..begin + target.len()]);
        } else {
            let (from, to) = (self.info.dtype.bits() as usize / 8, self.dtype.bits() as usize / 8);
            let begin = offset_bytes as usize / to * from;
            let source = &source[begin..begin + target.len() / to * from];
            let elements = cast(self.info.dtype, source, self.dtype, target);
            self.count_overflow(elements);
        }
        if offset_bytes + target.len() as u64 == TensorBytes::len_bytes(self) {
            self.tensor = None;
        }
        Ok(())
    }
}

impl Converted<'_> {
    fn count_overflow(&self, elements: u64) {
        if elements == 0 {
            return;
        }
        let mut overflowed = self.overflowed.borrow_mut();
        match overflowed.last_mut() {
            Some(last) if last.tensor == self.info.name => last.elements += elements,
            _ => overflowed.push(Overflowed { tensor: self.info.name.to_owned(), elements }),
        }
    }
}
