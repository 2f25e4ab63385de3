//! The pinner's figures, one contender at a time, with criterion's statistics and its comparison with the run before.
//! Ratios between contenders are `ratios.rs`'s.

mod bed;

use bed::contest::Scene;
use bed::scenes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn scenes(criterion: &mut Criterion) {
    for (name, make) in scenes::ALL {
        let Scene { units, contenders, .. } = match make() {
            Ok(scene) => scene,
            Err(error) => {
                eprintln!("{name}: cannot be set up here: {error}");
                continue;
            }
        };
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(units)).sample_size(20);
        for (who, mut contender) in contenders {
            group.bench_function(who, |bencher| {
                bencher.iter_custom(|times| (0..times).map(|_| contender.time()).sum());
            });
        }
        group.finish();
    }
}

criterion_group!(benches, scenes);
criterion_main!(benches);
