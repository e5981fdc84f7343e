// SPDX-License-Identifier: GPL-2.0

//! Table memory for tests: pages in a map, with checks of what an implementor may rely on.

use super::ept::TableMemory;
use crate::x86::address::Hpa;
use std::{cell::Cell, collections::BTreeMap};

/// Tables by their address. Any use of a table that was freed or never made panics.
pub(crate) struct TestTables {
    pub(crate) tables: BTreeMap<u64, Box<[u64; 512]>>,
    next: u64,
    /// How many more may be allocated.
    pub(crate) stock: usize,
    /// How many entries were read and written.
    pub(crate) accesses: Cell<u64>,
}

impl TestTables {
    pub(crate) fn new(stock: usize) -> Self {
        Self {
            tables: BTreeMap::new(),
            next: 0x10_0000,
            stock,
            accesses: Cell::new(0),
        }
    }
}

impl TableMemory for TestTables {
    fn read(&self, table: Hpa, index: usize) -> u64 {
        self.accesses.set(self.accesses.get() + 1);
        self.tables[&table.raw()][index]
    }

    fn write(&mut self, table: Hpa, index: usize, entry: u64) {
        self.accesses.set(self.accesses.get() + 1);
        self.tables.get_mut(&table.raw()).unwrap()[index] = entry;
    }

    fn allocate(&mut self) -> Option<Hpa> {
        self.stock = self.stock.checked_sub(1)?;
        let address = self.next;
        self.next += 0x1000;
        self.tables.insert(address, Box::new([0; 512]));
        Some(Hpa::new(address))
    }

    fn free(&mut self, table: Hpa) {
        assert!(self.tables.remove(&table.raw()).is_some(), "freed twice");
    }
}
