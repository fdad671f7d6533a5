package memory

// Slots returns how many channels the store's map holds, for whatever reason.
func Slots(s *Store) int {
	n := 0
	for i := range s.shards {
		s.shards[i].mu.RLock()
		n += len(s.shards[i].slots)
		s.shards[i].mu.RUnlock()
	}
	return n
}

// Held returns how many logs the store holds, without expiring any.
func Held(s *Store) int {
	n := 0
	s.each(func(sl *slot) {
		if sl.epoch != 0 {
			n++
		}
	})
	return n
}

// Sweeping tells whether the sweep's timer is set.
func Sweeping(s *Store) bool {
	s.sweep.mu.Lock()
	defer s.sweep.mu.Unlock()
	return s.sweep.due != 0
}
