package etcd

// Subscribed returns how many subscriptions there are of the channel, and of all.
func (b *Backend) Subscribed(channel string) (this, all int) {
	b.mu.Lock()
	p := b.push
	b.mu.Unlock()
	if p == nil {
		return 0, 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.subs[escape(channel)]), p.count
}
