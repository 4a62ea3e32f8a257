//! Shares are planned as they are: every architecture's, fused and not, and packed ones.

use std::sync::Arc;

use tensorhaul_plan::parallel::{Fuse, ModelConfig, Partition, Ranks, Rules, Setup};
use tensorhaul_plan::{DeviceId, Machine, Plan, Request};

use crate::golden::{all, recognize};
use crate::property::{fits, zoo};

#[test]
fn every_share_is_a_plan_of_as_many_bytes() {
    for (model, sizes) in zoo() {
        let checkpoint = Arc::new(model.checkpoint());
        let quantization = recognize(&checkpoint, &model);
        let dequantize = all(&quantization);
        let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
        let rules = Rules::of(&config).unwrap();
        // Packed experts of the tiny gpt-oss have three blocks of columns.
        let kinds = [
            (None, Fuse::No, 3),
            (None, Fuse::No, 1),
            (Some(&dequantize), Fuse::No, 8),
            (Some(&dequantize), Fuse::All, 2),
        ];
        for (dequantize, fuse, tp) in kinds {
            if !fits(&sizes, tp) {
                continue;
            }
            let setup = Setup { quantization: Some(&quantization), dequantize, fuse };
            let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
            for ranks in Ranks::all(tp as u32, 2, 1) {
                let share = partition.share(&ranks, DeviceId::Cuda(0)).unwrap();
                let len_bytes: u64 =
                    share.assembly.tensors.iter().map(|tensor| partition.len_bytes(tensor)).sum();
                let count = share.assembly.tensors.len();
                let mut request = Request::all();
                request.assembly = Some(Arc::new(share.assembly));
                request.dequantize = dequantize.cloned();
                request.device = DeviceId::Cuda(0);
                let plan = Plan::new(&checkpoint, &request, &Machine::default()).unwrap();
                assert_eq!(
                    (plan.promised().payload_bytes, plan.tensors().len()),
                    (len_bytes, count),
                    "{ranks}"
                );
            }
        }
    }
}
