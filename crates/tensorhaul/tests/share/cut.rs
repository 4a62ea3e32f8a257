//! Quantized tensors, cut where no model would be.

use tensorhaul::assembly::Source;
use tensorhaul::{Assembled, Assembly, DeviceId, Model, Part, Slice};

/// Cuts every quantized tensor along one dimension, as evenly as it goes.
pub(crate) fn cut(model: &Model, size: u64, dim: usize) -> Vec<Assembly> {
    let quantization = model.quantization().unwrap();
    let of_rank = |rank: u64| {
        let groups = (0..).zip(quantization.groups());
        let one = |(number, group): (u32, &tensorhaul::quant::Group)| {
            let dim = dim.min(group.shape.len() - 1);
            let len = group.shape[dim];
            // Uneven, so that codes, words and groups are cut apart.
            let ends = |rank: u64| if rank == size { len } else { (len * rank / size + rank % 2).min(len) };
            let mut ranges: Vec<_> = group.shape.iter().map(|len| 0..*len).collect();
            ranges[dim] = ends(rank)..ends(rank + 1);
            let shape = ranges.iter().map(|range| range.end - range.start).collect();
            let at = vec![0; group.shape.len()].into();
            let parts = [Part { source: Source::Made(number), slice: Slice::new(ranges), at }].into();
            Assembled { name: group.name.clone(), shape, device: DeviceId::Host, parts }
        };
        Assembly { tensors: groups.map(one).collect(), ..Assembly::default() }
    };
    (0..size).map(of_rank).collect()
}
