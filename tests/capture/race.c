// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* Sets SO_MARK while another thread rewrites the value between the kernel's looks at it. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

struct race {
	_Atomic uint32_t *word;
	_Atomic int running, stop;
	uint32_t forbidden, harmless;
};

static void *rewrite(void *argument)
{
	struct race *race = argument;

	atomic_store(&race->running, 1);
	while (!atomic_load_explicit(&race->stop, memory_order_relaxed)) {
		atomic_store(race->word, race->forbidden);
		atomic_store(race->word, race->harmless);
	}
	return NULL;
}

/* How often the forbidden mark was really set, -1 if the harmless one never was. */
int race_marks(int fd, uint32_t length, uint32_t forbidden, uint32_t harmless, int tries)
{
	static _Alignas(64) char buffer[1 << 17];
	struct race race = {(_Atomic uint32_t *)buffer, 0, 0, forbidden, harmless};
	int won = 0, passed = 0;
	pthread_t thread;
	uint32_t mark;
	socklen_t size;

	memset(buffer, 0, sizeof(buffer));
	pthread_create(&thread, NULL, rewrite, &race);
	while (!atomic_load(&race.running))
		;
	for (int i = 0; i < tries; i++) {
		passed += setsockopt(fd, SOL_SOCKET, SO_MARK, buffer, length) == 0;
		size = sizeof(mark);
		getsockopt(fd, SOL_SOCKET, SO_MARK, &mark, &size);
		won += mark == forbidden;
	}
	atomic_store(&race.stop, 1);
	pthread_join(thread, NULL);
	return passed ? won : -1;
}
