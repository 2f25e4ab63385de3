//! The pinner's figures, one contender at a time, with criterion's statistics and its comparison with the run before.
//! Ratios between contenders are `ratios.rs`'s.

mod bed;

use std::time::{Duration, Instant};

use bed::Contender;
use bed::scenes::{self, Scene};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn scenes(criterion: &mut Criterion) {
    for make in scenes::ALL {
        let Scene { id, units, contenders, .. } = make();
        let mut group = criterion.benchmark_group(id);
        group.throughput(Throughput::Elements(units)).sample_size(20);
        for (who, mut contender) in contenders {
            group.bench_function(who, |bencher| bencher.iter_custom(|times| time(&mut *contender, times)));
        }
        group.finish();
    }
}

/// What the work takes, so many times; making ready for it is not timed.
fn time(contender: &mut dyn Contender, times: u64) -> Duration {
    let mut took = Duration::ZERO;
    for _ in 0..times {
        contender.prepare();
        let start = Instant::now();
        contender.work();
        took += start.elapsed();
        contender.check();
    }
    took
}

criterion_group!(benches, scenes);
criterion_main!(benches);
