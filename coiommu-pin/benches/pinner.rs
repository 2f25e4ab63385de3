//! The pinner's figures, one contender at a time, with criterion's statistics and its comparison with the run before.
//! Ratios between contenders are `ratios.rs`'s.

mod bed;

use bed::scenes::{self, Scene};
use bed::stopwatch;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn scenes(criterion: &mut Criterion) {
    for make in scenes::ALL {
        let Scene { id, units, contenders, .. } = make();
        let mut group = criterion.benchmark_group(id);
        group.throughput(Throughput::Elements(units)).sample_size(20);
        for (who, mut contender) in contenders {
            group.bench_function(who, |bencher| {
                bencher.iter_custom(|times| (0..times).map(|_| stopwatch::time(&mut *contender)).sum())
            });
        }
        group.finish();
    }
}

criterion_group!(benches, scenes);
criterion_main!(benches);
