//! The asynchronous face: the same pipeline, on a thread of its own.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread;

use tokio::sync::{oneshot, watch};

use crate::cancel::Cancel;
use crate::error::{Error, ErrorKind, Result};
use crate::handover;
use crate::loaded::Loaded;
use crate::model::Inner;
use crate::options::LoadOptions;
use crate::progress::Progress;

/// A load in progress. Dropping it cancels the load; see [`Model::load_async`](crate::Model::load_async).
#[must_use = "dropping the future cancels the load"]
pub struct LoadFuture {
    result: oneshot::Receiver<Result<Loaded>>,
    progress: watch::Receiver<Progress>,
    cancel: Cancel,
}

impl LoadFuture {
    pub(crate) fn start(model: Arc<Inner>, options: LoadOptions) -> LoadFuture {
        let (finished, result) = oneshot::channel();
        let (sender, progress) = watch::channel(Progress::default());
        let cancel = Cancel::new();
        let load = {
            let cancel = cancel.clone();
            move || {
                let also = options.progress.clone();
                let options = options.on_progress(move |progress| {
                    sender.send_replace(progress);
                    if let Some(also) = &also {
                        also(progress);
                    }
                });
                let result = handover::load(&model, &options, &cancel);
                // Closes the progress and lets go of the files before anyone learns that the load is over.
                drop((options, model));
                // A future that was dropped has cancelled the load already.
                let _ = finished.send(result);
            }
        };
        // When no thread can be started the sender is dropped with the closure, and the poll below says so.
        let _ = thread::Builder::new().name("tensorhaul-load".to_owned()).spawn(load);
        LoadFuture { result, progress, cancel }
    }

    /// Returns totals as they grow: the latest at each call, none missed that matters, `None` once the
    /// load is over. Any number of these may wait, beside the future itself.
    pub fn progress(&self) -> ProgressStream {
        ProgressStream(self.progress.clone())
    }
}

impl Future for LoadFuture {
    type Output = Result<Loaded>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Loaded>> {
        Pin::new(&mut self.result).poll(context).map(|received| match received {
            Ok(result) => result,
            Err(_) => Err(Error::new(ErrorKind::Io, "the loading thread could not be started, or panicked")),
        })
    }
}

impl Drop for LoadFuture {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Totals of a load as they grow.
#[derive(Clone, Debug)]
pub struct ProgressStream(watch::Receiver<Progress>);

impl ProgressStream {
    /// Waits for newer totals; `None` once the load is over.
    pub async fn next(&mut self) -> Option<Progress> {
        self.0.changed().await.ok()?;
        Some(*self.0.borrow_and_update())
    }
}
