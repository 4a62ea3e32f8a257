//! Which hand-over a load gets, and the parts both have in common.

use std::sync::Arc;

use tensorhaul_plan::{DeviceId, TensorId};
use tensorhaul_stage::Layout;

use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::loaded::{Entry, Loaded, Tensors};
use crate::model::{Inner, Source};
use crate::options::{EngineChoice, Handover, LoadOptions, Preference};
use crate::report::Report;
use crate::tensor::Tensor;
use crate::{mapped, private};

/// Takes each tensor when it is ready.
pub(crate) type Emit<'a> = dyn FnMut(Ready<'_>) + 'a;

/// A tensor of the result that is ready.
pub(crate) struct Ready<'r> {
    /// The stored tensor it is, or whose codes it was made of.
    pub(crate) id: TensorId,
    /// What it is called in the result.
    pub(crate) name: &'r str,
    /// Whether that is not the stored tensor's name.
    pub(crate) is_renamed: bool,
    pub(crate) tensor: Tensor,
}

/// Loads, and collects the tensors.
pub(crate) fn load(model: &Inner, options: &LoadOptions, cancel: &Cancel) -> Result<Loaded> {
    let mut tensors = Vec::new();
    let report = run(model, options, cancel, &mut |ready| tensors.push(Entry::new(ready)))?;
    Ok(Loaded { tensors: Tensors::new(Arc::clone(&model.checkpoint), tensors), report })
}

/// Loads, and emits each tensor when it is ready.
pub(crate) fn run(
    model: &Inner,
    options: &LoadOptions,
    cancel: &Cancel,
    emit: &mut Emit<'_>,
) -> Result<Report> {
    staging_layout(options, 1)?;
    let is_on_host = options.request.device == DeviceId::Host && options.request.device_map.is_none();
    if options.direct_storage == Preference::Required && is_on_host {
        let what = "direct storage is required, and reads into devices; onto the host, reads land in place without it";
        return Err(Error::bad_request(what));
    }
    tracing::debug!(path = %model.path.display(), ?options, "loading");
    let mut report = if is_mapped(model, options)? {
        mapped::run(model, options, cancel, emit)?
    } else {
        private::run(model, options, cancel, emit)?
    };
    report.fallbacks.extend(options.fallbacks.iter().cloned());
    Ok(report)
}

/// Returns the buffers that the caller's staging budget gives each of so many devices.
pub(crate) fn staging_layout(options: &LoadOptions, device_count: usize) -> Result<Layout> {
    let budget_bytes = usize::try_from(options.staging_bytes).unwrap_or(usize::MAX);
    match Layout::new(budget_bytes / device_count, STAGING_ALIGN_BYTES) {
        Ok(layout) => Ok(layout),
        Err(error) if device_count == 1 => Err(error.into()),
        Err(error) => {
            let needed_bytes = error.needed_bytes * device_count;
            let what = format!(
                "a staging budget of {budget_bytes} bytes holds no buffer for each of {device_count} devices; the smallest is {needed_bytes} bytes"
            );
            Err(Error::bad_request(what))
        }
    }
}

/// Decides between the two hand-overs, or says which two options contradict each other.
fn is_mapped(model: &Inner, options: &LoadOptions) -> Result<bool> {
    let request = &options.request;
    let obstacle = match (options.engine, &model.source) {
        _ if request.device_map.is_some() => Some("a device map says where they go"),
        _ if request.device != DeviceId::Host => Some("the device is not the host"),
        _ if !options.targets.is_empty() || options.allocator.is_some() => Some("memory is given for them"),
        _ if options.dequantization.is_some() => Some("they are dequantized"),
        _ if options.parallel.is_some() || request.assembly.is_some() => {
            Some("they are put together from parts")
        }
        _ if !request.slices.is_empty() => Some("parts of tensors are asked for"),
        _ if options.in_place != Preference::Preferred => Some("how reads land is asked for"),
        (EngineChoice::Pread | EngineChoice::IoUring, _) => Some("an engine that reads is asked for"),
        (_, Source::Memory { .. }) => Some("the files are bytes in memory"),
        _ => None,
    };
    match (options.handover, obstacle) {
        (Handover::Private, _) | (Handover::Auto, Some(_)) => Ok(false),
        (Handover::Auto | Handover::Mapped, None) => Ok(true),
        (Handover::Mapped, Some(obstacle)) => {
            Err(Error::bad_request(format!("tensors cannot be mapped: {obstacle}; private hand-over works")))
        }
    }
}

/// The strictest alignment of direct reads that the probe accepts.
const STAGING_ALIGN_BYTES: usize = 4096;
