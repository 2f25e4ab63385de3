//! Building a table: whoever follows a directory's entry finds the zeros behind it. Explored in full.

use std::sync::Arc;

use coiommu_dtt::guest::GuestDtt;
use coiommu_dtt::{Gfn, Levels};
use loom::thread;

use crate::arena::Arena;
use crate::check::check;

/// Two CPUs of a guest need the same table, which is not there, while the host looks for it.
#[test]
fn a_table_is_zeros_to_whoever_finds_it() {
    check(None, || {
        let gfn = Gfn::new(0).unwrap();
        let memory = Arc::new(Arena::new(3, &[0]));
        let guest = GuestDtt::new(&*memory, &*memory, Levels::new(2).unwrap(), 2).unwrap();
        let cpu = thread::spawn({
            let memory = Arc::clone(&memory);
            move || guest.map(&*memory, &*memory, gfn).map(|_| ()).unwrap()
        });
        let host = thread::spawn({
            let memory = Arc::clone(&memory);
            move || {
                if let Ok(table) = guest.dtt().leaf_table(&*memory, gfn) {
                    assert!(table.leaf(gfn).load().count() <= 2);
                }
            }
        });
        let _not_pinned = guest.map(&*memory, &*memory, gfn).unwrap();
        cpu.join().unwrap();
        host.join().unwrap();
        let table = guest.dtt().leaf_table(&*memory, gfn).unwrap();
        assert_eq!(table.leaf(gfn).load().count(), 2, "both count in the same table");
    });
}
