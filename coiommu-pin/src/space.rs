//! Where the pinner gets guest memory from: [`TableSpace`].

use std::fmt::Debug;
use std::ops::Deref;

use coiommu_dtt::TableMemory;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

/// Guest memory that may change as a whole, taken one moment's view at a time.
///
/// Everything that is [`GuestAddressSpace`] over a [`GuestMemoryBackend`] is this: `GuestMemoryAtomic`, an `Arc` of a
/// `GuestMemoryMmap`, and so on, with any bitmap. Model checkers bring an arena of their own.
///
/// The view is for tables and requests only. What may be pinned is what the pinner was told in
/// [`Pinner::add_region`](crate::Pinner::add_region), as a view may be old.
pub trait TableSpace: Send + Sync {
    /// What a view shows.
    type Memory: TableMemory + ?Sized;
    /// One moment's view.
    type View: Deref<Target = Self::Memory>;

    /// The view of now. Taken once a piece of work, not per page.
    fn view(&self) -> Self::View;
}

impl<A> TableSpace for A
where
    A: GuestAddressSpace + Send + Sync,
    A::M: GuestMemoryBackend,
{
    type Memory = A::M;
    type View = A::T;

    fn view(&self) -> A::T {
        self.memory()
    }
}

/// What a view is of, for those that take one by reference.
pub(crate) type Memory<S> = <S as TableSpace>::Memory;

/// Stands in for a space in Debug output: guest memory is not printed.
#[derive(Debug)]
pub(crate) struct GuestMemoryNotShown;
