//! Reading inputs.

use arbitrary::{Arbitrary, Unstructured};

/// The next number of an input, 0 after its end.
pub fn number<'a, N: Arbitrary<'a> + Default>(input: &mut Unstructured<'a>) -> N {
    input.arbitrary().unwrap_or_default()
}
