//! Tensors in the order in which they are ready.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use crate::cancel::Cancel;
use crate::error::{Error, ErrorKind, Result};
use crate::handover::{self, Ready};
use crate::model::Inner;
use crate::options::LoadOptions;
use crate::report::Report;
use crate::tensor::Tensor;

/// Names and tensors in the order in which they are ready, while the rest still loads.
///
/// After an error the stream ends. Tensors already taken stay valid, whatever happens to the rest.
pub struct TensorStream {
    ready: Receiver<(String, Tensor)>,
    cancel: Cancel,
    thread: Option<JoinHandle<Result<Report>>>,
    report: Option<Report>,
}

impl TensorStream {
    pub(crate) fn start(model: Arc<Inner>, options: LoadOptions) -> Result<TensorStream> {
        let (sender, ready) = mpsc::channel();
        let cancel = Cancel::new();
        let load = {
            let cancel = cancel.clone();
            move || {
                let mut emit = |ready: Ready<'_>| {
                    // A stream that was dropped has cancelled the load already.
                    let _ = sender.send((ready.name.to_owned(), ready.tensor));
                };
                handover::run(&model, &options, &cancel, &mut emit)
            }
        };
        let thread = thread::Builder::new().name("tensorhaul-load".to_owned()).spawn(load);
        let thread = thread.map_err(|error| Error::new(ErrorKind::OutOfMemory, error))?;
        Ok(TensorStream { ready, cancel, thread: Some(thread), report: None })
    }

    /// Returns what the load did, once the stream has ended without an error.
    pub fn report(&self) -> Option<&Report> {
        self.report.as_ref()
    }
}

impl Iterator for TensorStream {
    type Item = Result<(String, Tensor)>;

    /// Waits for the next tensor.
    fn next(&mut self) -> Option<Result<(String, Tensor)>> {
        if let Ok(ready) = self.ready.recv() {
            return Some(Ok(ready));
        }
        match self.thread.take()?.join() {
            Ok(Ok(report)) => {
                self.report = Some(report);
                None
            }
            Ok(Err(error)) => Some(Err(error)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for TensorStream {
    fn drop(&mut self) {
        self.cancel.cancel();
        if let Some(thread) = self.thread.take() {
            // Its result no longer interests anyone; a panic was printed where it happened.
            let _ = thread.join();
        }
    }
}
