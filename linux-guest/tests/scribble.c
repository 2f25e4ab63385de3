// SPDX-License-Identifier: GPL-2.0-only
/*
 * Writes random bytes to all BARs of a PCI device, as a guest might that means
 * harm: scribble ADDRESS SECONDS. Half of the words are small numbers and page
 * addresses, which are more likely to mean something. Takes a kernel that was
 * booted with iomem=relaxed if the device has a driver.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define u8 uint8_t
#define u16 uint16_t
#define u32 uint32_t
#define u64 uint64_t

#define BARS 6

/* One write, as wide as what is pointed to. */
#define WRITE(to, word) __atomic_store_n(to, word, __ATOMIC_RELAXED)

struct bar {
	u8 *mem;
	size_t size;
};

/* xorshift64 */
static u64 random64(void)
{
	static u64 state = 0x9e3779b97f4a7c15;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static u64 some_word(void)
{
	u64 word = random64();

	switch (random64() % 4) {
	case 0:
		return word % 8;
	case 1:
		return word & 0x3ffff000;
	default:
		return word;
	}
}

static void write_some(const struct bar *bar)
{
	size_t at = random64() % bar->size;
	u64 word = some_word();

	/* Registers are at the beginning. */
	if (random64() % 2)
		at %= 64;
	switch (random64() % 4) {
	case 0:
		WRITE(bar->mem + at, (u8)word);
		break;
	case 1:
		WRITE((u16 *)(bar->mem + (at & ~1ul)), (u16)word);
		break;
	case 2:
		WRITE((u32 *)(bar->mem + (at & ~3ul)), (u32)word);
		break;
	default:
		WRITE((u64 *)(bar->mem + (at & ~7ul)), (u64)word);
	}
}

/* Returns whether the device has that BAR. */
static int map_bar(struct bar *bar, const char *address, int number)
{
	char path[128];
	struct stat st;
	int fd;

	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/resource%d",
		 address, number);
	fd = open(path, O_RDWR | O_SYNC);
	if (fd < 0 && errno == ENOENT)
		return 0;
	if (fd < 0 || fstat(fd, &st)) {
		perror(path);
		exit(1);
	}
	bar->size = st.st_size;
	bar->mem = mmap(NULL, bar->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (bar->mem == MAP_FAILED) {
		perror(path);
		exit(1);
	}
	close(fd);
	return 1;
}

int main(int argc, char **argv)
{
	struct bar bars[BARS];
	unsigned long written = 0;
	int count = 0;
	time_t end;

	if (argc != 3) {
		fprintf(stderr, "usage: scribble ADDRESS SECONDS\n");
		return 2;
	}
	for (int number = 0; number < BARS; number++)
		count += map_bar(&bars[count], argv[1], number);
	if (!count) {
		fprintf(stderr, "%s has no BARs\n", argv[1]);
		return 1;
	}
	end = time(NULL) + atoi(argv[2]);
	while (time(NULL) < end) {
		for (int n = 0; n < 100; n++)
			write_some(&bars[random64() % count]);
		written += 100;
	}
	printf("scribbled: %lu times on %d BARs\n", written, count);
	return 0;
}
