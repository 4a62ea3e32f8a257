//! The bytes of tensors that are dequantized, or put together, on their way into a copy.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tensorhaul_plan::{Assembled, Assembly, Request, Select};

use crate::error::Result;
use crate::model::Model;
use crate::options::{Handover, LoadOptions};
use crate::save::TensorBytes;
use crate::tensor::Tensor;

/// Loads tensors some at a time, in the order in which they will be written.
pub(super) struct Batches<'m> {
    model: &'m Model,
    /// How each of them is loaded, but for what.
    options: LoadOptions,
    /// What each is put together from, by its name; nothing for those of the checkpoint.
    assembled: Option<HashMap<String, Assembled>>,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// Names and bytes of what was not loaded yet.
    later: VecDeque<(String, u64)>,
    /// What was loaded and not written yet.
    loaded: HashMap<String, Tensor>,
}

impl<'m> Batches<'m> {
    /// `request` is complete: no batch asks again what a rank has, and what is dequantized.
    pub(super) fn new(model: &'m Model, options: &LoadOptions, request: &Request) -> Batches<'m> {
        let mut request = request.clone();
        let assembly = request.assembly.take();
        let by_name = |tensor: &Assembled| (tensor.name.clone(), tensor.clone());
        let assembled = assembly.map(|assembly| assembly.tensors.iter().map(by_name).collect());
        let options = LoadOptions { parallel: None, dequantization: None, request, ..options.clone() };
        Batches { model, options: options.handover(Handover::Private), assembled, state: RefCell::default() }
    }

    /// Notes a tensor that will be asked for, behind those noted before.
    fn expect(&self, name: &str, len_bytes: u64) {
        self.state.borrow_mut().later.push_back((name.to_owned(), len_bytes));
    }

    /// Returns a tensor, loading it and those behind it if it is not there yet.
    fn take(&self, name: &str) -> Result<Tensor> {
        let mut state = self.state.borrow_mut();
        if !state.loaded.contains_key(name) {
            let (mut names, mut len_bytes) = (Vec::new(), 0);
            while let Some((_, next_bytes)) = state.later.front()
                && (names.is_empty() || len_bytes + next_bytes <= BATCH_LEN_BYTES)
                && let Some((next, next_bytes)) = state.later.pop_front()
            {
                names.push(next);
                len_bytes += next_bytes;
            }
            let mut request = self.options.request.clone();
            match &self.assembled {
                None => request.select = Select::Names(names),
                Some(assembled) => {
                    let tensors = names.iter().map(|name| assembled[name].clone()).collect();
                    request.assembly = Some(Arc::new(Assembly { tensors, ..Assembly::default() }));
                }
            }
            let loaded = self.model.load(&self.options.clone().request(request))?;
            state.loaded.extend(loaded.tensors);
        }
        Ok(state
            .loaded
            .remove(name)
            .expect("tensors are asked for in the order in which they were announced"))
    }
}

/// The bytes of one tensor.
pub(super) struct Made<'b, 'm> {
    pub(super) name: String,
    pub(super) len_bytes: u64,
    pub(super) batches: &'b Batches<'m>,
    /// From the first piece on.
    pub(super) bytes: Option<Bytes>,
}

/// Where the bytes are.
pub(super) enum Bytes {
    Host(Tensor),
    /// Brought back from a device.
    Copied(Vec<u8>),
}

impl TensorBytes for Made<'_, '_> {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn announce(&self) {
        if self.len_bytes > 0 {
            self.batches.expect(&self.name, self.len_bytes);
        }
    }

    fn fill(&mut self, offset_bytes: u64, target: &mut [u8]) -> Result<()> {
        let bytes = match &mut self.bytes {
            Some(bytes) => bytes,
            none => {
                let tensor = self.batches.take(&self.name)?;
                none.insert(match tensor.bytes() {
                    Ok(_) => Bytes::Host(tensor),
                    Err(_) => Bytes::Copied(tensor.to_host()?),
                })
            }
        };
        let mut source = match bytes {
            Bytes::Host(tensor) => tensor.bytes()?,
            Bytes::Copied(bytes) => bytes,
        };
        source.fill(offset_bytes, target)?;
        if offset_bytes + target.len() as u64 == self.len_bytes {
            self.bytes = None;
        }
        Ok(())
    }
}

/// What is dequantized ahead of the writer: some tensors of a large model, so that reading does not stop at each. Tests have small
/// models, and several batches all the same.
const BATCH_LEN_BYTES: u64 = if cfg!(test) { 64 } else { 256 << 20 };
