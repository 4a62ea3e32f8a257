//! Arguments that several commands have, and how they are read.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use tensorhaul::{
    Dequantization, DeviceId, Dtype, EngineChoice, LoadOptions, Model, Preference, Request, Select,
};

use crate::failure::Failure;
use crate::ranks::Sharing;
use crate::share::NodeSharing;

/// What to load, onto what, through how much memory.
#[derive(Args)]
pub(crate) struct Selection {
    /// Load only tensors that match; may be given several times. `*` also crosses dots
    #[arg(long = "tensor", value_name = "GLOB")]
    tensors: Vec<String>,

    #[command(flatten)]
    placement: Placement,

    /// Which tensors go to which devices: a JSON file such as {"model.layers.0": 0, "lm_head": ["cuda:0", "cuda:1"], "": "cpu"}, or `auto` for
    /// whole layers by what is free. Numbers are of the vendor of --device
    #[arg(long, value_name = "FILE|auto")]
    device_map: Option<PathBuf>,

    /// The devices of `--device-map auto` [default: all of the vendor of --device]
    #[arg(long, value_name = "DEVICES", value_delimiter = ',', requires = "device_map", value_parser = parse_named_device)]
    devices: Vec<DeviceId>,

    #[command(flatten)]
    pub(crate) sharing: Sharing,

    #[command(flatten)]
    pub(crate) node: NodeSharing,

    #[command(flatten)]
    dequantizing: Dequantizing,

    /// The most device memory for packed tensors that wait to be dequantized [default: 256MiB, or what the largest needs]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, requires = "dequantize")]
    transient: Option<u64>,

    #[command(flatten)]
    bound: Bound,
}

impl Selection {
    pub(crate) fn options(&self, model: &Model) -> Result<LoadOptions, Failure> {
        self.options_of(model, false)
    }

    /// As [`Selection::options`], of all ranks where `is_of_all`.
    pub(crate) fn options_of(&self, model: &Model, is_of_all: bool) -> Result<LoadOptions, Failure> {
        let (device, fallbacks) =
            self.device().map_or_else(tensorhaul::default_device_told, |device| (device, Vec::new()));
        Ok(self.options_on(model, is_of_all, device)?.fallbacks(fallbacks))
    }

    /// Returns the device that is named.
    pub(crate) fn device(&self) -> Option<DeviceId> {
        self.placement.device.named()
    }

    /// As [`Selection::options_of`], onto this device.
    pub(crate) fn options_on(
        &self,
        model: &Model,
        is_of_all: bool,
        device: DeviceId,
    ) -> Result<LoadOptions, Failure> {
        let select = match self.tensors.as_slice() {
            [] => Select::All,
            globs => Select::Globs(globs.to_vec()),
        };
        let mut request = Request::of(select);
        request.device = device;
        if let Some(over_read_max) = self.bound.over_read_max {
            request.over_read_max = over_read_max;
        }
        let mut options = self.placement.options().request(request);
        if let Some(dequantization) = self.dequantizing.dequantization() {
            options = options.dequantize(dequantization);
        }
        if let Some(transient_bytes) = self.transient {
            options = options.transient_bytes(transient_bytes);
        }
        if let Some(parallel) = self.sharing.parallel(is_of_all)? {
            options = options.parallel(parallel);
        }
        let map = match &self.device_map {
            None => return Ok(options),
            Some(auto) if auto.as_os_str() == "auto" => model.device_map(&options, &self.devices)?,
            Some(_) if !self.devices.is_empty() => return Err(Failure::of_request(DEVICES_WITHOUT_AUTO)),
            Some(file) => tensorhaul::read_device_map(file, device)?,
        };
        Ok(options.device_map(map))
    }
}

const DEVICES_WITHOUT_AUTO: &str = "--devices is for --device-map auto; a file names devices itself";

/// Which quantized tensors become numbers.
#[derive(Args)]
pub(crate) struct Dequantizing {
    /// Turn quantized tensors (GPTQ, AWQ, FP8, MXFP4, NVFP4, ...) into this dtype, under the names they had before
    #[arg(long, value_name = "DTYPE", value_parser = cast_targets())]
    dequantize: Option<Dtype>,

    /// Dequantize only results that match, such as '*.mlp.*'; may be given several times
    #[arg(long = "dequantize-only", value_name = "GLOB", requires = "dequantize")]
    only: Vec<String>,

    /// Multiply factors for input channels (pre_quant_scale) into the weights instead of handing them over
    #[arg(long, requires = "dequantize")]
    fold: bool,

    /// Keep [in, out] for formats that store it so (GPTQ, AWQ GEMM), which spares a transposition
    #[arg(long, requires = "dequantize")]
    as_stored: bool,
}

impl Dequantizing {
    pub(crate) fn dequantization(&self) -> Option<Dequantization> {
        let mut dequantization = Dequantization::to(self.dequantize?);
        if !self.only.is_empty() {
            dequantization = dequantization.only(&self.only);
        }
        if self.fold {
            dequantization = dequantization.fold();
        }
        if self.as_stored {
            dequantization = dequantization.as_stored();
        }
        Some(dequantization)
    }
}

/// How much may be read that is not needed.
#[derive(Args)]
pub(crate) struct Bound {
    /// The most to read, as a multiple of what is needed: gaps that are cheaper read than skipped, and whole blocks of direct reads. What
    /// cannot be spared beyond it is told [default: 1.02]
    #[arg(long, value_name = "FACTOR", value_parser = parse_factor)]
    pub(crate) over_read_max: Option<f64>,
}

/// Onto what to load, through how much memory.
#[derive(Args)]
pub(crate) struct Placement {
    /// Where the tensors go: `auto` is the GPU with the most memory, or the host where there is none
    #[arg(long, value_name = "host|cuda:N|rocm:N|auto", default_value = "auto", value_parser = parse_device)]
    pub(crate) device: Device,

    /// The most memory between storage and device: bytes, or with a unit such as 16MiB or 256MB [default: 256MiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    staging: Option<u64>,

    /// Whether reads may land in the tensors' own memory, without a stop in the staging ring
    #[arg(long, value_name = "WHEN", default_value = "preferred", value_parser = preferences())]
    in_place: Preference,

    /// Whether storage writes straight into the device's memory (GPUDirect Storage, hipFile), where files and kernel allow it
    #[arg(long = "gds", value_name = "WHEN", default_value = "off", value_parser = preferences())]
    direct_storage: Preference,
}

impl Placement {
    /// Returns all but the device.
    pub(crate) fn options(&self) -> LoadOptions {
        let options = LoadOptions::default().in_place(self.in_place).direct_storage(self.direct_storage);
        match self.staging {
            Some(staging_bytes) => options.staging_bytes(staging_bytes),
            None => options,
        }
    }
}

/// Reads the names of engines.
pub(crate) fn engines() -> impl TypedValueParser<Value = EngineChoice> {
    PossibleValuesParser::new(["auto", "mmap", "pread", "io-uring"])
        .try_map(|name| name.parse::<EngineChoice>())
}

/// Reads the names of dtypes that tensors can be cast to.
pub(crate) fn cast_targets() -> impl TypedValueParser<Value = Dtype> {
    PossibleValuesParser::new(["f32", "f16", "bf16"])
        .try_map(|name| Dtype::from_name(&name.to_ascii_uppercase()).ok_or("no such dtype"))
}

fn preferences() -> impl TypedValueParser<Value = Preference> {
    PossibleValuesParser::new(["required", "preferred", "off"]).try_map(|name| name.parse::<Preference>())
}

/// A device by its name, or the one that is best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Auto,
    Named(DeviceId),
}

impl Device {
    /// Returns the device named; finding the best is left to the library.
    pub(crate) fn named(self) -> Option<DeviceId> {
        match self {
            Device::Auto => None,
            Device::Named(id) => Some(id),
        }
    }
}

/// Reads the name of a device.
pub(crate) fn parse_device(text: &str) -> Result<Device, String> {
    match text {
        "auto" => Ok(Device::Auto),
        _ => parse_named_device(text).map(Device::Named),
    }
}

fn parse_named_device(text: &str) -> Result<DeviceId, String> {
    text.parse().map_err(|error: tensorhaul::UnknownDevice| error.to_string())
}

/// Reads a factor of at least 1.
fn parse_factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(factor) if factor.is_finite() && factor >= 1.0 => Ok(factor),
        _ => Err("give a number from 1 on, such as 1.02".to_owned()),
    }
}

/// Reads a number of bytes: plain, or with a unit of 1000 (`kB`, `MB`, `GB`, `TB`) or 1024 (`KiB` to `TiB`).
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1000 * 1000,
        "gb" => 1000 * 1000 * 1000,
        "tb" => 1000 * 1000 * 1000 * 1000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err("give bytes, or a unit: 256MiB (of 1024) or 256MB (of 1000)".to_owned()),
    };
    let number: u64 =
        number.parse().map_err(|_| "give a whole number of bytes, or one with a unit: 256MiB".to_owned())?;
    number.checked_mul(factor).ok_or_else(|| "more bytes than a u64 counts".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_and_without_a_unit() {
        let good = [
            ("0", 0),
            ("4095", 4095),
            ("16MiB", 16 << 20),
            ("256MB", 256_000_000),
            ("1 gib", 1 << 30),
            ("7B", 7),
        ];
        for (text, expected) in good {
            assert_eq!(parse_bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "MiB", "-1", "1.5GB", "1XB", "99999999TiB", "1M"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn factors_begin_at_1() {
        assert_eq!((parse_factor("1"), parse_factor("1.02")), (Ok(1.0), Ok(1.02)));
        for text in ["", "0.99", "-1", "NaN", "inf", "1e999", "2x"] {
            assert!(parse_factor(text).is_err(), "{text}");
        }
    }

    #[test]
    fn devices_are_read_by_their_names() {
        assert_eq!(parse_device("auto"), Ok(Device::Auto));
        assert_eq!(parse_device("cuda:1"), Ok(Device::Named(DeviceId::Cuda(1))));
        assert!(parse_device("tpu").is_err());
    }
}
