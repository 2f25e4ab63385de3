//! The topology map: which endpoints the guest's driver has to track.

use coiommu_dtt::Bdf;

/// The topology map as the guest reads it: a u16 count, then the BDF of each endpoint, a u16; the rest is 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    bytes: Vec<u8>,
}

/// A list of endpoints that no topology map can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// More than the map has room for.
    #[error("{0} endpoints: the topology map has room for {most}", most = Topology::MOST)]
    TooMany(usize),
    /// The same one twice.
    #[error("endpoint {0} is given more than once")]
    Twice(Bdf),
}

impl Topology {
    /// How many endpoints the map has room for.
    pub const MOST: usize = 4095;

    /// The map of these endpoints, in this order.
    ///
    /// # Errors
    ///
    /// [`TopologyError`]: too many, or one of them twice.
    pub fn new(endpoints: &[Bdf]) -> Result<Self, TopologyError> {
        let count = u16::try_from(endpoints.len()).ok().filter(|&count| usize::from(count) <= Self::MOST);
        let count = count.ok_or(TopologyError::TooMany(endpoints.len()))?;
        let mut sorted = endpoints.to_vec();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find_map(|pair| (pair[0] == pair[1]).then_some(pair[0])) {
            return Err(TopologyError::Twice(twice));
        }
        let words = std::iter::once(count).chain(endpoints.iter().map(|bdf| bdf.raw()));
        Ok(Self { bytes: words.flat_map(u16::to_le_bytes).collect() })
    }

    /// The guest reads some bytes of the map, which may be anywhere: what is beyond the last endpoint is 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, from) in data.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *byte = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(count: u16) -> Vec<Bdf> {
        (1..=count).map(|raw| Bdf::new(raw).unwrap()).collect()
    }

    #[test]
    fn a_map_is_a_count_and_the_endpoints_and_nothing() {
        let topology = Topology::new(&["00:05.0".parse().unwrap(), "01:00.1".parse().unwrap()]).unwrap();
        let mut words = [0xee; 10];
        topology.read(0, &mut words);
        assert_eq!(words, [2, 0, 0x28, 0, 0x01, 1, 0, 0, 0, 0]);
        for (offset, expected) in [(3, [0, 0x01]), (5, [1, 0]), (6, [0, 0]), (u64::MAX, [0, 0])] {
            let mut two = [0xee; 2];
            topology.read(offset, &mut two);
            assert_eq!(two, expected, "at {offset}");
        }
    }

    #[test]
    fn a_map_is_full_at_4095() {
        let full = Topology::new(&endpoints(4095)).unwrap();
        assert_eq!(full.bytes.len() as u64, crate::Bar::SIZE);
        assert_eq!(Topology::new(&endpoints(4096)), Err(TopologyError::TooMany(4096)));
        assert_eq!(Topology::new(&endpoints(u16::MAX)), Err(TopologyError::TooMany(65_535)));
    }

    #[test]
    fn nobody_is_in_it_twice() {
        let twice = [7, 3, 9, 3].map(|raw| Bdf::new(raw).unwrap());
        assert_eq!(Topology::new(&twice), Err(TopologyError::Twice(twice[1])));
    }
}
